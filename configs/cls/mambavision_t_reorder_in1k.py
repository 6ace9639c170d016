"""MambaVision-T with sorted tokens on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=4`."""

_base_ = ["../_base_/imagenet.py", "../_base_/mambavision_310e.py"]

model = dict(model_name="mambavision_t_reorder", drop_path_rate=0.2, mesa=0.25)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=8e-4, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=1.25e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, begin=20, end=300, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=512)
