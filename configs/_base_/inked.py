"""Handwritten digits on photographs at 64 px, the ink to be found: 480 to train on and 120 to validate on."""

_base_ = ["./masks.py"]

data_preprocessor = dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadMask"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadMask"),
    dict(type="PackSegInputs"),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        type="MaskedImages", data_root="data/inked", data_prefix="train", make="inked", pipeline=train_pipeline
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=60,
    num_workers=1,
    dataset=dict(
        type="MaskedImages",
        data_root="data/inked",
        data_prefix="val",
        make="inked",
        pipeline=test_pipeline,
        test_mode=True,
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
