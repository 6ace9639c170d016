"""scikit-learn's handwritten digits, 8 px, to learn to make; 200 held-out ones say which are asked for."""

_base_ = ["./generation.py"]

pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=8, interpolation="bicubic", backend="pillow"),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    drop_last=True,
    dataset=dict(type="ImageFolder", data_root="data/digits", data_prefix="train", make="digits", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=1,
    dataset=dict(
        type="ImageFolder",
        data_root="data/digits",
        data_prefix="val",
        make="digits",
        pipeline=pipeline,
        indices=[9 * i // 5 for i in range(200)],
        test_mode=True,
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(judge="data/digits/train")
test_evaluator = val_evaluator

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(save_best="generate/accuracy", rule="greater"),
    ema=dict(momentum=0.02),
)
