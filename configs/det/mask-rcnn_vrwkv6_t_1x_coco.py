"""Mask R-CNN with Vision-RWKV6-T on COCO, 12 epochs.

The authors published no such model: Vision-RWKV's recipe, without its adapter.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv6_t",
        pretrained=True,
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
