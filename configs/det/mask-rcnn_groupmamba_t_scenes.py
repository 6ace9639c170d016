"""GroupMamba-T, from the quickstart's classifier of digits, finds digits on photographs: minutes on two CPU cores."""

_base_ = ["../_base_/mask_rcnn.py", "../_base_/scenes_coco.py"]

channels = 64
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(model_name="groupmamba_t", pretrained="work_dirs/quickstart/export/model.safetensors"),
    neck=dict(in_channels=[64, 128, 348, 448], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(max_per_img=100), rcnn=dict(max_per_img=20)),
)

max_epochs = 4
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(
    constructor="LayerDecay",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(backbone_lr_mult=0.3),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="coco/bbox_mAP_50", rule="greater"),
    sync_buffers=dict(type="SyncBuffersHook"),
    resume=dict(type="ResumeHook"),
    progress=dict(type="ProgressHook"),
    curves=dict(type="CurveHook"),
)
