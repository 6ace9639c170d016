"""VideoMamba-S on ImageNet-1k by its published recipe: 32 processes, `--amp`."""

_base_ = ["../_base_/imagenet.py", "../_base_/vrwkv_300e.py"]

model = dict(model_name="videomamba_s", drop_path_rate=0.15)
optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.1))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=4e-5, begin=5, end=300, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=4096)
