"""KAT's recipe: DeiT's with a short warm-up, cosine to 0, mimetic attention, gradients not clipped."""

_base_ = ["./deit_300e.py"]

model = dict(weight_init="mimetic")
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0, begin=5, end=300, convert_to_iter_based=True),
]
