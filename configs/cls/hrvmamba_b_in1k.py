"""HRVMamba-B on ImageNet-1k by its published recipe, at 224 px: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/hrvmamba_300e.py"]

train_pipeline = _base_.train_pipeline
train_pipeline[1]["scale"] = 224
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"] = test_pipeline[2]["crop_size"] = 224

model = dict(model_name="hrvmamba_b", drop_path_rate=0.2)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
