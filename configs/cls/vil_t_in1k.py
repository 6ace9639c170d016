"""ViL-T on ImageNet-1k at 192 px by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet_192.py", "../_base_/vil_400e.py"]

model = dict(model_name="vil_t", drop_path_rate=0.0)
train_cfg = dict(max_epochs=800)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=800, convert_to_iter_based=True),
]
