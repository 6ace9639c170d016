"""Restore-RWKV on pairs of images by its published recipe; `data/restore/{train,val}/{input,target}/<name>`.

300 epochs of 1,000 steps of 4 crops of 128 px, Adam without weight decay, cosine from 2e-4 to 1e-6, absolute error.
Images of 8 or 16 bits, or float32 TIFFs with white at 1; crops are flipped, which the authors do not do.
"""

_base_ = ["../_base_/restore.py"]

model = dict(type="Restorer", model_name="restore_rwkv")

train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    dataset=dict(type="PairedImages", data_root="data/restore", data_prefix="train", crop=128, length=4000),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type="PairedImages", data_root="data/restore", data_prefix="val"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader

max_epochs = 300
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(type="Adam", lr=2e-4, betas=(0.9, 0.999), eps=1e-8))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=1e-6, end=max_epochs, convert_to_iter_based=True)]
