"""Cascade Mask R-CNN with MambaVision-S on COCO, 36 epochs, at many scales, by its published recipe with `--amp`."""

_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="mambavision_s",
        model_kwargs=dict(window_size=(112, 56)),
        pretrained="weights/mambavision_s.pth",
        out_norm=True,
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
