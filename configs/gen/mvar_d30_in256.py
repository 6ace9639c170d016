"""M-VAR-d30 on ImageNet at 256 px by its published recipe, 8 processes of 128 images, with --amp.

The decay stays at 0.05, which the authors let grow to 0.08.
"""

_base_ = ["./mvar_d24_in256.py"]

model = dict(model_name="mvar_d30")
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=3.2e-4))
auto_scale_lr = dict(base_batch_size=1024)
