"""Mask R-CNN with GroupMamba-T on COCO, 36 epochs, at many scales.

The paper's tables name models and results, not the recipe: VMamba's is taken.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="groupmamba_t",
        pretrained="weights/groupmamba_t.pth",
        drop_path_rate=0.05,
    ),
    neck=dict(in_channels=[64, 128, 348, 448]),
)
