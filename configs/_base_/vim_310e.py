"""Vim's recipe: 300 epochs and 10 at the lowest rate, slower averaging, gradients not clipped."""

_base_ = ["./deit_300e.py"]

train_cfg = dict(max_epochs=310)
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5, end=300, convert_to_iter_based=True),
]
default_hooks = dict(ema=dict(momentum=4e-5))
