"""MILA-B on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/deit_300e.py", "../_base_/mesa.py"]

model = dict(model_name="mila_b", drop_path_rate=0.5, mesa=2.0)
