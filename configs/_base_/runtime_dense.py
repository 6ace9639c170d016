"""What every run of a segmenter or detector shares: hooks, environment, seed. BatchNorms are synchronised on GPUs."""

custom_imports = dict(imports=["linzoo.backbones", "linzoo.tools.engine"], allow_failed_imports=False)
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
randomness = dict(seed=0)
sync_bn = "torch"
val_cfg = dict()
test_cfg = dict()
