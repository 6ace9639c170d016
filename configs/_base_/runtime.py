"""What every run shares: hooks, environment, seed."""

default_scope = "mmpretrain"
custom_imports = dict(imports=["linzoo.backbones", "linzoo.tools.engine"], allow_failed_imports=False)

# max_keep_ckpts: 2 at least, since mmengine removes the oldest checkpoint before it writes the newest.
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3, save_best="accuracy/top1", rule="greater"),
    sync_buffers=dict(type="SyncBuffersHook"),
    resume=dict(type="ResumeHook"),
    progress=dict(type="ProgressHook"),
    curves=dict(type="CurveHook"),
    export=dict(type="ExportHook"),
)
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
randomness = dict(seed=0)
