"""What runs on images of classes share: images in [-1, 1], metric, averaged weights."""

_base_ = ["./runtime.py"]

data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)

val_evaluator = dict(type="GenerationMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    checkpoint=dict(save_best="generate/FID", rule="less"),
    ema=dict(type="EMAHook", momentum=1e-4, update_buffers=True),
)
