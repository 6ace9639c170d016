"""A VMamba of five narrow blocks on handwritten digits: two minutes on one CPU core."""

_base_ = ["./groupmamba_t_digits.py"]

model = dict(model_name="vmamba_t", depths=(1, 1, 2, 1), dims=(32, 64, 128, 256))

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
