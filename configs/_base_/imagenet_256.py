"""ImageNet-1k to make images of 256 px; images in `data/imagenet/{train,val}/<wnid>/`."""

_base_ = ["./generation.py"]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=256, edge="short", interpolation="bicubic", backend="pillow"),
    dict(type="CenterCrop", crop_size=256),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=256, edge="short", interpolation="bicubic", backend="pillow"),
    dict(type="CenterCrop", crop_size=256),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=88,
    num_workers=8,
    pin_memory=True,
    drop_last=True,
    dataset=dict(type="ImageFolder", data_root="data/imagenet", data_prefix="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type="ImageFolder", data_root="data/imagenet", data_prefix="val", pipeline=test_pipeline, test_mode=True
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
