"""36 epochs of AdamW, 1,000 steps of warm-up, rate by 10 down after 27 and 33; 16 images a step."""

_base_ = ["./adamw_1x.py"]

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
