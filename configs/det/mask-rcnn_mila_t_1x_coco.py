"""Mask R-CNN with MILA-T on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="mila_t",
        pretrained="weights/mila_t.pth",
        out_norm=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
