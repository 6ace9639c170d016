"""What runs on frames between frames share: metric and hooks."""

_base_ = ["./runtime.py"]

data_preprocessor = dict(type="BaseDataPreprocessor")

val_evaluator = dict(type="InterpolationMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(checkpoint=dict(save_best="frame/PSNR"))
