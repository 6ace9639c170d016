"""Mask R-CNN with EfficientVMamba-T on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="efficientvmamba_t",
        pretrained="weights/efficientvmamba_t.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
