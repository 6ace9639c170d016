"""PlainMamba-L1 on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/plainmamba_300e.py"]

model = dict(model_name="plainmamba_l1", drop_path_rate=0.2)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=15, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=15, end=300, convert_to_iter_based=True),
]
