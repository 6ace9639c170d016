"""Vision-RWKV-6-B on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=16`."""

_base_ = ["../_base_/imagenet.py", "../_base_/vrwkv_300e.py"]

model = dict(model_name="vrwkv6_b", drop_path_rate=0.5)
train_dataloader = dict(batch_size=64)
