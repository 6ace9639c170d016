"""Mask R-CNN with Vision-RWKV-S with adapter on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv_s_adapter_det",
        pretrained="https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth",
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.85))
