"""Mask R-CNN with MILA-S on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="mila_s",
        pretrained="weights/mila_s.pth",
        out_norm=True,
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
