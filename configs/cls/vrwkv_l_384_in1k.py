"""Vision-RWKV-L fine-tuned on ImageNet-1k at 384 px by its published recipe: `torchrun --nproc_per_node=8`.

It begins from the authors' weights of ImageNet-22k at 192 px, a file to be downloaded.
"""

_base_ = ["../_base_/imagenet.py", "../_base_/adamw_300e.py"]

model = dict(
    model_name="vrwkv_l",
    drop_path_rate=0.1,
    pretrained=True,
    pretrained_cfg_overlay=dict(file="work_dirs/vrwkv_l_in22k_192.pth", num_classes=21841),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8)], probs=[0.5]),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=384, interpolation="bicubic", backend="pillow"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"] = test_pipeline[2]["crop_size"] = 384
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=20)
optim_wrapper = dict(optimizer=dict(lr=1e-5), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-8, begin=2, end=20, convert_to_iter_based=True),
]
default_hooks = dict(ema=dict(type="EMAHook", momentum=1e-4, update_buffers=True))
