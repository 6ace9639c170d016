"""M-VAR-d30 on ImageNet at 256 px by its published recipe, 8 processes of 128 images, with --amp.

The decay stays at 0.05, which the authors let grow to 0.08.
"""

_base_ = ["./mvar_d16_in256.py"]

model = dict(model_name="mvar_d30")
train_dataloader = dict(batch_size=128)

max_epochs = 350
warm = max_epochs // 50
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3.2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.005, end=warm, convert_to_iter_based=True),
    dict(
        type="LinearLR",
        start_factor=1,
        end_factor=0.01,
        begin=warm + (max_epochs - warm) // 20,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=1024)
