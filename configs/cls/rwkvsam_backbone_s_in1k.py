"""RWKV-SAM's backbone, S, on ImageNet-1k by its published schedule: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/adamw_300e.py"]

model = dict(model_name="rwkvsam_backbone_s")
