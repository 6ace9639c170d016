"""Mask R-CNN with MambaVision-T on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="mambavision_t",
        model_kwargs=dict(window_size=(112, 56)),
        pretrained="weights/mambavision_t.pth",
        out_norm=True,
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
