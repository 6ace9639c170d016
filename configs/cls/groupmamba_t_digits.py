"""GroupMamba-T on handwritten digits: a few minutes on two CPU cores."""

_base_ = ["../_base_/runtime.py", "../_base_/digits.py"]

model = dict(
    type="Classifier",
    model_name="groupmamba_t",
    num_classes=10,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.05),
)

max_epochs = 15
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10))
