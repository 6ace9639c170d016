"""Mask R-CNN with Vision-RWKV-B with adapter on COCO, 36 epochs, at many scales."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco_multiscale.py", "../_base_/adamw_3x.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv_b_adapter_det",
        pretrained="https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_b_in1k_224.pth",
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.85))
