"""MambaVision-L on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/mambavision_310e.py"]

model = dict(model_name="mambavision_l", drop_path_rate=0.3, mesa=6.0)
optim_wrapper = dict(optimizer=dict(weight_decay=0.12))
