"""Mask R-CNN with KAT-S on COCO, 12 epochs.

The authors released no such recipe: VMamba's is taken.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="kat_small_patch16_224",
        pretrained=True,
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
