"""Mask R-CNN with Vim-T on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vim_t",
        pretrained="weights/vim_t.pth",
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
