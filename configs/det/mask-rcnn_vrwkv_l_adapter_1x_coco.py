"""Mask R-CNN with Vision-RWKV-L with adapter on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv_l_adapter_det",
        pretrained="https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_l_22kto1k_384.pth",
        drop_path_rate=0.4,
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.85))
