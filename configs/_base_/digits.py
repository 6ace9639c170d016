"""scikit-learn's handwritten digits, 1,437 to train on and 360 to validate on, drawn at 32 px."""

data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=32, interpolation="bicubic", backend="pillow"),
    dict(type="NumpyToPIL"),
    dict(type="torchvision/RandomAffine", degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1), shear=5),
    dict(type="PILToNumpy"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=32, interpolation="bicubic", backend="pillow"),
    dict(type="PackInputs"),
]

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        type="ImageFolder", data_root="data/digits", data_prefix="train", make="digits", pipeline=train_pipeline
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=180,
    num_workers=1,
    dataset=dict(
        type="ImageFolder",
        data_root="data/digits",
        data_prefix="val",
        make="digits",
        pipeline=test_pipeline,
        test_mode=True,
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()
