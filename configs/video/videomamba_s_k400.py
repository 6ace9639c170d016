"""VideoMamba-S on Kinetics-400, 8 frames of a clip, by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["./videomamba_t_k400.py"]

model = dict(model_name="videomamba_s_video", drop_path_rate=0.35, pretrained="weights/videomamba_s.pth")
train_cfg = dict(max_epochs=50)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=50, convert_to_iter_based=True),
]
