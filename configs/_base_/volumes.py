"""What the segmentation of volumes shares: loaders of cases in nnU-Net's layout, metric, hooks."""

_base_ = ["./runtime.py"]

train_dataloader = dict(
    batch_size=2,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(type="Volumes", folders=("imagesTr", "labelsTr"), data_prefix="train", length=500),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,  # cases differ in size
    num_workers=4,
    dataset=dict(type="Volumes", folders=("imagesTr", "labelsTr"), data_prefix="val"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="VolumeMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(checkpoint=dict(save_best="volume/Dice"))
