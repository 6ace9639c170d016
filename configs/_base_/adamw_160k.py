"""160,000 steps of AdamW: 1,500 of warm-up, then linear to 0; 16 images a step."""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
optim_wrapper = dict(
    constructor="LayerDecay",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=3, save_best="mIoU", rule="greater"
    ),
    sync_buffers=dict(type="SyncBuffersHook"),
    resume=dict(type="ResumeHook"),
    progress=dict(type="ProgressHook"),
    curves=dict(type="CurveHook"),
)
# `--cfg-options auto_scale_lr.enable=True` scales the learning rate to another number of images a step.
auto_scale_lr = dict(base_batch_size=16, enable=False)
