"""Mask R-CNN with Vim-S on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vim_s",
        pretrained="weights/vim_s.pth",
        drop_path_rate=0.05,
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
