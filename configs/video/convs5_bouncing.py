"""A narrow ConvS5 learns how two handwritten digits bounce around, 32 px: eight minutes on one CPU core."""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="NextFrame",
    model_name="convs5_video",
    context=5,
    dims=(16, 32, 32),
    dim=32,
    depth=3,
    d_state=64,
    num_groups=8,
)

data_preprocessor = dict(type="BaseDataPreprocessor")

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(type="Clips", data_root="data/bouncing", part="train", make="bouncing"),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    dataset=dict(type="Clips", data_root="data/bouncing", part="val", make="bouncing"),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="NextFrameMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

max_epochs = 10
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-5),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]

default_hooks = dict(logger=dict(interval=25), checkpoint=dict(save_best="frame/below_copy"))
