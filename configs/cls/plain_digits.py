"""A plain ViT of two blocks on handwritten digits; `linzoo mixers` trains one with each token mixer."""

_base_ = ["./groupmamba_t_digits.py"]

model = dict(model_name="plain_ss2d_t", img_size=32, patch_size=4, depth=2)

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
