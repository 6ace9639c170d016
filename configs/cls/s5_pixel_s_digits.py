"""S5 on handwritten digits as sequences of 64 pixels: two minutes on one CPU core."""

_base_ = ["../_base_/runtime.py", "../_base_/digits.py"]

model = dict(
    type="Classifier",
    model_name="s5_pixel_s",
    num_classes=10,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.05),
    proj_drop_rate=0.1,
)

# As they are, 8 px wide.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="NumpyToPIL"),
    dict(type="torchvision/RandomAffine", degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=5),
    dict(type="PILToNumpy"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 20
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=4e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10))
