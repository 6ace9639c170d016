"""Mask R-CNN with MILA-S on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="mila_s",
        pretrained="weights/mila_s.pth",
        out_norm=True,
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
