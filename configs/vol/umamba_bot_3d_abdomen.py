"""umamba_bot_3d on abdominal CT, 13 organs, by nnU-Net's schedule; `data/abdomen/{train,val}/{imagesTr,labelsTr}/`.

The plan is ours, of the kind that nnU-Net makes for such scans: put yours (`nnUNetPlans.json`) in its place.
"""

_base_ = ["../_base_/volumes.py", "../_base_/nnunet_1000e.py"]

crop = (40, 224, 192)
data = dict(data_root="data/abdomen", num_classes=14, spacing=(2.5, 0.8, 0.8))
model = dict(
    type="VolumeSegmenter",
    model_name="umamba_bot_3d",
    patch_size=crop,
    features=(32, 64, 128, 256, 320, 320),
    strides=((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    deep_supervision=True,
    num_classes=14,
    window=crop,
)
train_dataloader = dict(dataset=dict(**data, crop=crop))
val_dataloader = dict(dataset=dict(**data))
test_dataloader = val_dataloader
val_evaluator = dict(num_classes=14)
test_evaluator = val_evaluator
