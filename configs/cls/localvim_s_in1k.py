"""LocalVim-S on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/localmamba_300e.py"]

model = dict(model_name="localvim_s", drop_path_rate=0.1)
optim_wrapper = dict(clip_grad=None)
