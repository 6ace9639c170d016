"""Cascade Mask R-CNN with MambaVision-B on COCO, 36 epochs, at many scales, by its published recipe with `--amp`."""

_base_ = ["../_base_/cascade_mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="mambavision_b",
        model_kwargs=dict(window_size=(112, 56)),
        pretrained="weights/mambavision_b.pth",
        out_norm=True,
        drop_path_rate=0.5,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
