"""PlainMamba-L2 on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/plainmamba_300e.py"]

model = dict(model_name="plainmamba_l2", drop_path_rate=0.2)
train_dataloader = dict(batch_size=256)
default_hooks = dict(ema=dict(type="EMAHook", momentum=1e-4, update_buffers=True))
