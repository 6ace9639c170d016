"""terminator on handwritten digits of 16 px: minutes on two CPU cores."""

_base_ = ["../_base_/runtime.py", "../_base_/digits.py"]

model = dict(
    type="Classifier",
    model_name="terminator",
    num_classes=10,
    img_size=16,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    auxiliary=dict(slow=1.0, norms=5e-5),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=16, interpolation="bicubic", backend="pillow"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=16, interpolation="bicubic", backend="pillow"),
    dict(type="PackInputs"),
]
train_dataloader = dict(drop_last=True, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 4
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(type="Kar3", lr=0.001, betas=(0.5, 0.95)))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0, begin=1, end=max_epochs, convert_to_iter_based=True),
]
