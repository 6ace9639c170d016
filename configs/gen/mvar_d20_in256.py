"""M-VAR-d20 on ImageNet at 256 px by its published recipe, 8 processes of 96 images, with --amp."""

_base_ = ["./mvar_d16_in256.py"]

model = dict(model_name="mvar_d20")

max_epochs = 250
warm = max_epochs // 50
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.005, end=warm, convert_to_iter_based=True),
    dict(
        type="LinearLR",
        start_factor=1,
        end_factor=0.1,
        begin=warm + (max_epochs - warm) // 20,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
