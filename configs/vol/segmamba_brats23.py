"""SegMamba on BraTS 2023, four MR channels and three kinds of tissue: crops of 128, SGD for 1000 epochs.

`data/brats23/{train,val}/{imagesTr,labelsTr}/`, channels numbered as nnU-Net does.
"""

_base_ = ["../_base_/volumes.py", "../_base_/nnunet_1000e.py"]

crop = (128, 128, 128)
data = dict(data_root="data/brats23", num_classes=4, spacing=None)
model = dict(
    type="VolumeSegmenter",
    model_name="segmamba",
    in_chans=4,
    num_classes=4,
    window=crop,
)
train_dataloader = dict(dataset=dict(**data, crop=crop))
val_dataloader = dict(dataset=dict(**data))
test_dataloader = val_dataloader
val_evaluator = dict(num_classes=4)
test_evaluator = val_evaluator
