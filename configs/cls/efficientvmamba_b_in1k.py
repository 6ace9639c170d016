"""EfficientVMamba-B on ImageNet-1k by its published recipe: `torchrun --nnodes=2 --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/localmamba_300e.py"]

model = dict(model_name="efficientvmamba_b", drop_path_rate=0.1)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
