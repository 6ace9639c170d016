"""ViL-B on ImageNet-1k at 192 px by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet_192.py", "../_base_/vil_400e.py"]

model = dict(model_name="vil_b", drop_path_rate=0.2)
