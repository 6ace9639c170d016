"""S4ND-ConvNeXt-T on ImageNet-1k by its published recipe, 3,840 images a step: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/deit_300e.py"]

model = dict(model_name="s4nd_convnext_tiny", drop_path_rate=0.1)
train_dataloader = dict(batch_size=480)
train_cfg = dict(max_epochs=310)
optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.05), clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=20, end=310, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=3840)
