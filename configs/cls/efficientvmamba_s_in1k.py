"""EfficientVMamba-S on ImageNet-1k by its published recipe: `torchrun --nnodes=2 --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/localmamba_300e.py"]

model = dict(model_name="efficientvmamba_s", drop_path_rate=0.1)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
auto_scale_lr = dict(base_batch_size=2048)
