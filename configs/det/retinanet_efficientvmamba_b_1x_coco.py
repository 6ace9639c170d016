"""RetinaNet with EfficientVMamba-B on COCO, 12 epochs."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="efficientvmamba_b",
        pretrained="weights/efficientvmamba_b.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
