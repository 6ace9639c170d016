"""Mask R-CNN with LocalVim-S on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="localvim_s",
        pretrained="weights/localvim_s.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
