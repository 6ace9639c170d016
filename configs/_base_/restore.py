"""What restoration runs share: metric and hooks."""

_base_ = ["./runtime.py"]

val_evaluator = dict(type="RestorationMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(checkpoint=dict(save_best="restore/PSNR"))
