"""DiMSUM-L/2 on CelebA-HQ at 512 px by its published recipe; images in `data/celebahq/{train,val}/all/`."""

_base_ = ["./dimsum_l_2_celebahq256.py"]

model = dict(img_resolution=64)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=512, edge="short", interpolation="bicubic", backend="pillow"),
    dict(type="CenterCrop", crop_size=512),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=512, edge="short", interpolation="bicubic", backend="pillow"),
    dict(type="CenterCrop", crop_size=512),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=16, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=32)
