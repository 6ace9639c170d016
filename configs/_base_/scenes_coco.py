"""Handwritten digits on photographs at 128 px, to be detected: 400 to train on and 80 to validate on."""

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(type="CocoImages", data_root="data/scenes", make="scenes", metainfo=dict(classes=tuple("0123456789")))
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        ann_file="training.json",
        data_prefix=dict(img="images/training/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
        **dataset,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    dataset=dict(
        ann_file="validation.json",
        data_prefix=dict(img="images/validation/"),
        pipeline=test_pipeline,
        test_mode=True,
        **dataset,
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"], ann_file="data/scenes/validation.json")
test_evaluator = val_evaluator
