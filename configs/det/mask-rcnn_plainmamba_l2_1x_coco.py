"""Mask R-CNN with PlainMamba-L2 on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="plainmamba_l2",
        pretrained="weights/plainmamba_l2.pth",
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
