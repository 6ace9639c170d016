"""EfficientViM-M3 on ImageNet-1k by its published recipe, with MESA: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/efficientvim_310e.py"]

model = dict(model_name="efficientvim_m3")
