"""VM-UNet's recipe on ISIC18 at 256 px; images and masks in `data/isic18/{train,val}/{images,masks}/`.

The network sees 0 to 255, stretched so in each image. The authors normalise by the data set's mean and deviation
first, which the stretching undoes: left out.
"""

_base_ = ["./masks.py"]

data_preprocessor = dict(type="ImgDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3, bgr_to_rgb=True)

train_pipeline = [
    dict(type="LoadImageFromFile", to_float32=True),
    dict(type="LoadMask"),
    dict(type="Rerange"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="RandomRotate", prob=0.5, degree=(0, 360), pad_val=0, seg_pad_val=0),
    dict(type="Resize", scale=(256, 256)),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", to_float32=True),
    dict(type="LoadMask"),
    dict(type="Rerange"),
    dict(type="Resize", scale=(256, 256)),
    dict(type="PackSegInputs"),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    pin_memory=True,
    drop_last=True,
    dataset=dict(type="MaskedImages", data_root="data/isic18", data_prefix="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type="MaskedImages", data_root="data/isic18", data_prefix="val", pipeline=test_pipeline, test_mode=True
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader

train_cfg = dict(by_epoch=True, max_epochs=300)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2))
# The rate falls for 50 epochs, rises for the next 50, and so on.
param_scheduler = [dict(type="CosineAnnealingLR", T_max=50, eta_min=1e-5)]
randomness = dict(seed=42)
