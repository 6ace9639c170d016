"""Cascade Mask R-CNN with MambaVision-T on COCO, 36 epochs, at many scales, by its published recipe with `--amp`."""

_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

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
