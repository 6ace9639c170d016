"""VSSD-T on ImageNet-1k by its published recipe without MESA: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/deit_300e.py"]

model = dict(model_name="vssd_t", drop_path_rate=0.2)
