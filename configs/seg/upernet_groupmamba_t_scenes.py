"""GroupMamba-T, from the quickstart's classifier of digits, segments digits on photographs: minutes on two CPU cores.

From random weights instead: `--cfg-options model.backbone.pretrained=False`.
"""

_base_ = ["../_base_/upernet.py", "../_base_/scenes.py"]

# Without mmseg's `init_cfg`, whose classifiers of pixels start so small that the ten digits stay alike for long.
head = dict(channels=64, num_classes=11, dropout_ratio=0.0, init_cfg=None)
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, size=(128, 128)),
    backbone=dict(model_name="groupmamba_t", pretrained="work_dirs/quickstart/export/model.safetensors"),
    decode_head=dict(in_channels=[64, 128, 348, 448], **head),
    auxiliary_head=dict(in_channels=348, **head),
)

max_epochs = 6
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(
    constructor="LayerDecay",
    optimizer=dict(type="AdamW", lr=5e-3, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(backbone_lr_mult=0.2),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="mIoU", rule="greater"),
    sync_buffers=dict(type="SyncBuffersHook"),
    resume=dict(type="ResumeHook"),
    progress=dict(type="ProgressHook"),
    curves=dict(type="CurveHook"),
)
