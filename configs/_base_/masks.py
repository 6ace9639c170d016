"""What runs on images with masks share: metric and hooks."""

_base_ = ["./runtime.py"]

default_scope = "mmseg"
val_evaluator = dict(type="MaskMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(checkpoint=dict(save_best="mask/mIoU"))
