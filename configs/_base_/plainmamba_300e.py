"""PlainMamba's recipe: 300 epochs of AdamW at 2,048 images a step (8 x 256), Mixup and CutMix in turns."""

_base_ = ["./adamw_300e.py"]

model = dict(train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]))
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=20, end=300, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
