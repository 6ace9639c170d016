"""KAT-Small on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/kat_300e.py"]

model = dict(model_name="kat_small_patch16_224", drop_path_rate=0.1)
