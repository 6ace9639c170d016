"""ImageNet-1k at 192 px, colours jittered, no other augmentation of single images."""

_base_ = ["./imagenet.py"]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=192, interpolation="bicubic", backend="pillow"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
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
