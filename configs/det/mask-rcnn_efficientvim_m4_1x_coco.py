"""Mask R-CNN with EfficientViM-M4 on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="efficientvim_m4",
        pretrained=True,
        out_norm=True,
        out_indices=(0, 1, 2),
        norm_eval=True,
    ),
    neck=dict(_delete_=True, type="FinerFPN", in_channels=[224, 320, 512], finer=2),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
