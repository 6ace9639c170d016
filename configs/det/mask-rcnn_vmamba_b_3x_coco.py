"""Mask R-CNN with VMamba-B on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vmamba_b",
        pretrained=True,
        out_norm=True,
        drop_path_rate=0.6,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
