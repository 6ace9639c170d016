"""Mask R-CNN with RWKV-SAM's backbone S on COCO, 36 epochs, at many scales.

ADE20K's recipe of the authors' tree; COCO's is VMamba's.
"""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="rwkvsam_backbone_s",
        pretrained="weights/rwkvsam_backbone_s.pth",
        out_norm=True,
    ),
    neck=dict(in_channels=[64, 128, 384, 384]),
)
