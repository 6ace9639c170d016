"""GroupMamba-T on ImageNet-1k by its published recipe, with the DeiT teacher: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/deit_300e.py"]

model = dict(
    model_name="groupmamba_t",
    drop_path_rate=0.05,
    distillation="hard",
    teacher=dict(model_name="regnety_160.deit_in1k", pretrained=True),
)
