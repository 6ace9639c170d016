"""A narrow DiMSUM learns to make handwritten digits of ten classes, in pixels: minutes on two CPU cores."""

_base_ = ["../_base_/generated_digits.py"]

model = dict(
    type="FlowMatching",
    model_name="dimsum_b_2",
    img_resolution=8,
    in_channels=3,
    hidden_size=128,
    depth=4,
    num_classes=10,
    label_dropout=0.1,
    sampler="heun",
    steps=20,
    guidance=2.0,
)

max_epochs = 40
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=10)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
