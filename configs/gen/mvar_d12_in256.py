"""M-VAR-d12 on ImageNet at 256 px by its published recipe, 8 processes of 96 images, with --amp."""

_base_ = ["./mvar_d16_in256.py"]

model = dict(model_name="mvar_d12")
