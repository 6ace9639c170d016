"""A narrow MHS-VM finds handwritten digits on photographs: a minute or two on two CPU cores."""

_base_ = ["../_base_/inked.py"]

model = dict(
    type="Segmenter",
    model_name="mhs_vm_unet",
    dims=(32, 64, 128, 256),
    depths=(1, 1, 1, 1),
    depths_decoder=(1, 1, 1, 1),
    drop_path_rate=0.0,
)

max_epochs = 8
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=5e-3, weight_decay=1e-2))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=1, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10))
