"""The 300-epoch recipe of LocalMamba and EfficientVMamba: DeiT's with little mixup, lower last rate, tighter clipping.

The authors' RandAugment is timm's "rand-m9-mstd0.5"; that of `imagenet.py` is the variant whose strength grows with the
magnitude ("-inc1").
"""

_base_ = ["./deit_300e.py"]

model = dict(train_cfg=dict(augments=[dict(type="Mixup", alpha=0.2), dict(type="CutMix", alpha=1.0)]))
optim_wrapper = dict(optimizer=dict(weight_decay=0.04), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=20, end=300, convert_to_iter_based=True),
]
