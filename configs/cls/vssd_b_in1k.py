"""VSSD-B on ImageNet-1k by its published recipe without MESA: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/deit_300e.py"]

model = dict(model_name="vssd_b", drop_path_rate=0.6)
optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=6e-6, begin=20, end=300, convert_to_iter_based=True),
]
