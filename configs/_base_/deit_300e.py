"""The 300-epoch recipe of DeiT that most families follow: Mixup, CutMix and averaged weights."""

_base_ = ["./adamw_300e.py"]

model = dict(train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]))
default_hooks = dict(ema=dict(type="EMAHook", momentum=1e-4, update_buffers=True))
