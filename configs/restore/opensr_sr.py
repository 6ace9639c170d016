"""opensr-mamba, four times the size: from its published weights, on pairs of pictures.

`data/sr_x4/{train,val}/{input,target}/<name>`, targets four times as large. The model was trained on Sentinel-2's
reflectances, which are darker than photographs: those are scaled by 0.4 before it, and back behind it.
Super-resolve pictures: `linzoo predict restore/opensr_sr opensr_sr PICTURES --out DIR`.
"""

_base_ = ["../_base_/restore.py"]

model = dict(type="Restorer", model_name="opensr_sr", pretrained=True, gain=0.4)

train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    dataset=dict(
        type="PairedImages", data_root="data/sr_x4", data_prefix="train", channels=3, scale=4, crop=64, length=4000
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type="PairedImages", data_root="data/sr_x4", data_prefix="val", channels=3, scale=4),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(levels=255, luma=True, border=4)
test_evaluator = val_evaluator

max_epochs = 20
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(type="Adam", lr=1e-4, betas=(0.9, 0.99)))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=1e-6, end=max_epochs, convert_to_iter_based=True)]
