"""vfimamba on Vimeo90K's triplets, the first part of the curriculum: 300 epochs of batches of 32; four processes."""

_base_ = ["../_base_/interpolation.py"]

model = dict(type="Interpolator", model_name="vfimamba")
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(type="Triplets", data_root="data/vimeo_triplet", part="train", crop=256),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type="Triplets", data_root="data/vimeo_triplet", part="test"),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=10)
optim_wrapper = dict(constructor="TimmWeightDecay", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=1, end=300, convert_to_iter_based=True),
]
