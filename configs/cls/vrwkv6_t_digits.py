"""Vision-RWKV-6, four blocks of it, on the handwritten digits 0 to 4, for `tools/state_tuning.py` to go on from."""

_base_ = ["../_base_/runtime.py", "../_base_/digits.py"]

model = dict(
    type="Classifier",
    model_name="vrwkv6_t",
    num_classes=5,
    img_size=32,
    patch_size=4,
    depth=4,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.05),
)
data_preprocessor = dict(num_classes=5)
train_dataloader = dict(dataset=dict(data_root="data/low_digits", make="low_digits"))
val_dataloader = dict(dataset=dict(data_root="data/low_digits", make="low_digits"))
test_dataloader = val_dataloader

max_epochs = 15
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=4))
