"""Mask R-CNN with Vision-RWKV-T with adapter on COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/coco.py", "../_base_/adamw_1x.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv_t_adapter_det",
        pretrained="https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth",
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01), paramwise_cfg=dict(layer_decay=0.85))
