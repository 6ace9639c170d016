"""Mask R-CNN with S4ND-ConvNeXt-T on COCO, 12 epochs.

The authors trained no such model: VMamba's recipe is taken.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="s4nd_convnext_tiny",
        pretrained="weights/s4nd_convnext_tiny.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
