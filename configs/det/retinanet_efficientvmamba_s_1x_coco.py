"""RetinaNet with EfficientVMamba-S on COCO, 12 epochs."""

_base_ = ["../_base_/retinanet.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="efficientvmamba_s",
        pretrained="weights/efficientvmamba_s.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
