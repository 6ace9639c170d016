"""Mask R-CNN with GroupMamba-T on COCO, 12 epochs.

The paper's tables name models and results, not the recipe: VMamba's is taken.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="groupmamba_t",
        pretrained="weights/groupmamba_t.pth",
        drop_path_rate=0.05,
    ),
    neck=dict(in_channels=[64, 128, 348, 448]),
)
