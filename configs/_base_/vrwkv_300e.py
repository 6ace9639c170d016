"""The recipe of Vision-RWKV's S and B: Mixup and CutMix in turns, no averaged weights; T has neither."""

_base_ = ["./adamw_300e.py"]

model = dict(train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]))
