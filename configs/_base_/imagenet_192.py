"""ImageNet-1k at 192 px with 3-Augment (DeiT III, arXiv 2204.07118): grey, solarised or blurred, then jittered."""

_base_ = ["./imagenet.py"]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=192, interpolation="bicubic", backend="pillow"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomGrayscale", prob=1.0, keep_channels=True, channel_weights=(0.114, 0.587, 0.299))],
            [dict(type="Solarize", thr=128, prob=1.0)],
            [dict(type="GaussianBlur", magnitude_range=(0.1, 2.0), magnitude_std="inf", prob=1.0)],
        ],
    ),
    dict(type="ColorJitter", brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=192, edge="short", interpolation="bicubic", backend="pillow"),
    dict(type="CenterCrop", crop_size=192),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=256, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=256, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(batch_size=256, dataset=dict(pipeline=test_pipeline))
