"""ViM2-T on ImageNet-1k by the recipe of the paper, with the drop path of VMamba: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/deit_300e.py"]

model = dict(model_name="vim2_t", drop_path_rate=0.2)
