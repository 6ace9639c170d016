"""EfficientViM's recipe: 2,048 images a step, learning rate 2e-3, cosine to 2e-5, 10 epochs more, MESA."""

_base_ = ["./imagenet.py", "./deit_300e.py", "./mesa.py"]

model = dict(mesa=1.0)

train_cfg = dict(max_epochs=310)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=0.02))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=20, end=300, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
default_hooks = dict(ema=dict(momentum=5e-4))
