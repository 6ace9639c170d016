"""Mask R-CNN with Vision-RWKV6-T on COCO, 36 epochs, at many scales.

The authors published no such model: Vision-RWKV's recipe, without its adapter.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv6_t",
        pretrained=True,
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
