"""A small M-VAR learns to make handwritten digits of ten classes: minutes on two CPU cores.

First train its tokenizer: `linzoo train gen/mvar_tokenizer_digits`.
"""

_base_ = ["../_base_/generated_digits.py"]

model = dict(
    type="NextScale",
    model_name="mvar_d12",
    depth=2,
    patch_nums=(1, 2, 3, 4),
    V=128,
    Cvae=16,
    num_classes=10,
    gate_init=0.1,
    tokenizer=dict(
        model_name="mvar_tokenizer", pretrained="work_dirs/mvar_tokenizer_digits/export/model.safetensors", ch=32,
        ch_mult=(1, 2),
    ),
    guidance=1.5,
    top_k=64,
    top_p=0.96,
)  # fmt: skip

max_epochs = 20
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=10)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05),
    clip_grad=dict(max_norm=2.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
