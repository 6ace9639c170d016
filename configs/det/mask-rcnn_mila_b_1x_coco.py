"""Mask R-CNN with MILA-B on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="mila_b",
        pretrained="weights/mila_b.pth",
        out_norm=True,
        drop_path_rate=0.5,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
