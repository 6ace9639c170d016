"""Restore-RWKV, light, removes Gaussian noise of sigma 25 from grey photographs: minutes on two CPU cores."""

_base_ = ["../_base_/restore.py"]

model = dict(type="Restorer", model_name="restore_rwkv_light", loss="charbonnier")

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(
        type="PairedImages",
        data_root="data/noisy",
        data_prefix="train",
        make="noisy",
        crop=48,
        noise=25 / 255,
        length=1120,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=5,
    num_workers=0,
    dataset=dict(type="PairedImages", data_root="data/noisy", data_prefix="val", make="noisy"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader

max_epochs = 8
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=max_epochs, convert_to_iter_based=True),
]
