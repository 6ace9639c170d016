"""A small RGT doubles the size of photographs, beside bicubic interpolation, on the CPU."""

_base_ = ["../_base_/restore.py"]

model = dict(
    type="Restorer", model_name="rgt_x2", dim=64, depths=(4, 4), num_heads=4, window=(8, 16), drop_path_rate=0.0
)

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(
        type="PairedImages",
        data_root="data/photos",
        data_prefix="train",
        make="photos",
        channels=3,
        scale=2,
        bicubic=True,
        crop=32,
        rotate=True,
        length=800,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(
        type="PairedImages",
        data_root="data/photos",
        data_prefix="val",
        make="photos",
        channels=3,
        scale=2,
        bicubic=True,
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(levels=255, luma=True, border=2, against_bicubic=True)
test_evaluator = val_evaluator

max_epochs = 10
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(optimizer=dict(type="Adam", lr=1e-3, betas=(0.9, 0.99)), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=max_epochs, convert_to_iter_based=True),
]
