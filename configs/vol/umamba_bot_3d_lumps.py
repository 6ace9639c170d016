"""A narrow U-Mamba finds ellipsoids in synthetic volumes: minutes on two CPU cores.

Other models: `--cfg-options model.model_name=umamba_enc_3d`.
"""

_base_ = ["../_base_/volumes.py"]

crop = (16, 32, 32)
data = dict(data_root="data/lumps", folders=("images", "labels"), num_classes=3, make="lumps")
model = dict(
    type="VolumeSegmenter",
    model_name="umamba_bot_3d",
    num_classes=3,
    patch_size=crop,
    features=(8, 16, 32, 64),
    strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    deep_supervision=True,
    window=crop,
)
train_dataloader = dict(num_workers=1, dataset=dict(**data, crop=crop, foreground=0.7, length=96))
val_dataloader = dict(num_workers=0, dataset=dict(**data))
test_dataloader = val_dataloader
val_evaluator = dict(num_classes=3)
test_evaluator = val_evaluator

max_epochs = 6
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=3e-3, weight_decay=1e-4), clip_grad=dict(max_norm=12))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=1e-5, end=max_epochs, convert_to_iter_based=True)]
