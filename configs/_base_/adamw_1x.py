"""12 epochs of AdamW, 1,000 steps of warm-up, rate by 10 down after 8 and 11; 16 images a step."""

train_cfg = dict(by_epoch=True, max_epochs=12)
optim_wrapper = dict(
    constructor="LayerDecay",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="coco/bbox_mAP", rule="greater"),
    sync_buffers=dict(type="SyncBuffersHook"),
    resume=dict(type="ResumeHook"),
    progress=dict(type="ProgressHook"),
    curves=dict(type="CurveHook"),
)
# `--cfg-options auto_scale_lr.enable=True` scales the learning rate to another number of images a step.
auto_scale_lr = dict(base_batch_size=16, enable=False)
