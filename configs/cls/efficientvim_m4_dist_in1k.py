"""EfficientViM-M4 on ImageNet-1k with the DeiT teacher, by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["./efficientvim_m4_in1k.py"]

model = dict(
    model_name="efficientvim_m4_dist",
    mesa=0.0,
    distillation="hard",
    teacher=dict(model_name="regnety_160.deit_in1k", pretrained=True),
)
custom_hooks = []
