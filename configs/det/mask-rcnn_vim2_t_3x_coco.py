"""Mask R-CNN with ViM2-T on COCO, 36 epochs, at many scales.

The authors released no such recipe: VMamba's is taken.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vim2_t",
        pretrained="weights/vim2_t.pth",
        out_norm=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
