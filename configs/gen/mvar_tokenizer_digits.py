"""A small tokenizer of handwritten digits, for `mvar_mini_digits.py`: minutes on two CPU cores."""

_base_ = ["../_base_/generated_digits.py"]

model = dict(
    type="ImageTokenizer", model_name="mvar_tokenizer", V=128, Cvae=16, ch=32, ch_mult=(1, 2), patch_nums=(1, 2, 3, 4)
)
val_evaluator = dict(_delete_=True, type="RestorationMetric")
test_evaluator = val_evaluator

max_epochs = 24
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=8)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(save_best="restore/PSNR"))
