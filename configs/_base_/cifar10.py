"""CIFAR-10 as it is, for sequences of 1,024 pixels; downloaded to `data/cifar10` unless it is there."""

# mmpretrain reads the images as RGB.
data_preprocessor = dict(num_classes=10, mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7], to_rgb=False)
pipeline = [dict(type="PackInputs")]

train_dataloader = dict(
    batch_size=50,
    num_workers=2,
    drop_last=True,
    dataset=dict(type="CIFAR10", data_root="data/cifar10", split="train", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=200,
    num_workers=2,
    dataset=dict(type="CIFAR10", data_root="data/cifar10", split="test", pipeline=pipeline, test_mode=True),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()
