"""ViL's recipe: 400 epochs of AdamW at 2,048 images a step (8 x 256) with `--amp`, no label smoothing."""

_base_ = ["./adamw_300e.py"]

model = dict(
    img_size=192,
    loss=dict(_delete_=True, type="CrossEntropyLoss", use_soft=True),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)
train_cfg = dict(max_epochs=400)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=400, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
