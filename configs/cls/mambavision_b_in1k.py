"""MambaVision-B on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/mambavision_310e.py"]

model = dict(model_name="mambavision_b", drop_path_rate=0.3, mesa=1.0)
optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-4, end=35, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, begin=35, end=300, convert_to_iter_based=True),
]
custom_hooks = [dict(type="MesaHook", begin=90)]
