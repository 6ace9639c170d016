"""PlainMamba-L3 on ImageNet-1k by its published recipe, in float32: `torchrun --nproc_per_node=4`."""

_base_ = ["../_base_/imagenet.py", "../_base_/plainmamba_300e.py"]

model = dict(model_name="plainmamba_l3", drop_path_rate=0.4)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=20, end=300, convert_to_iter_based=True),
]
default_hooks = dict(ema=dict(type="EMAHook", momentum=1e-4, update_buffers=True))
auto_scale_lr = dict(base_batch_size=1024)
