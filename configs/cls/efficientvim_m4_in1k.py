"""EfficientViM-M4 on ImageNet-1k at 256 px by its published recipe, with MESA: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/efficientvim_310e.py"]

train_pipeline = _base_.train_pipeline
train_pipeline[1]["scale"] = 256
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"], test_pipeline[2]["crop_size"] = 292, 256

model = dict(model_name="efficientvim_m4")
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
