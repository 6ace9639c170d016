"""Mask R-CNN with HRVMamba-B on COCO, 12 epochs.

The maps are those of the four streams; the paper takes its classifier's neck along.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="hrvmamba_b",
        pretrained="weights/hrvmamba_b.pth",
        out_norm=True,
        drop_path_rate=0.15,
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
