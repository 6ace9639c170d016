"""S5's recipe for images as sequences: AdamW at 0.0045, at 0.001 without decay for the state matrices."""

_base_ = ["./s4_200e.py"]

train_cfg = dict(max_epochs=250)
optim_wrapper = dict(optimizer=dict(lr=4.5e-3, weight_decay=0.07))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0, begin=1, end=250, convert_to_iter_based=True),
]
