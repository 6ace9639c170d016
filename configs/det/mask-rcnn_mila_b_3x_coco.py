"""Mask R-CNN with MILA-B on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="mila_b",
        pretrained="weights/mila_b.pth",
        out_norm=True,
        drop_path_rate=0.5,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
