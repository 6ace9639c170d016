"""MambaVision's recipe: 300 epochs of LAMB at 4,096 images a step (32 x 128) and 10 at the lowest rate, with MESA."""

_base_ = ["./deit_300e.py"]

train_cfg = dict(max_epochs=310)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="mmpretrain.Lamb", lr=5e-3, betas=(0.9, 0.999), weight_decay=0.05)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-4, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, begin=20, end=300, convert_to_iter_based=True),
]
default_hooks = dict(ema=dict(momentum=2e-4))
custom_hooks = [dict(type="MesaHook", begin=75)]
auto_scale_lr = dict(base_batch_size=4096)
