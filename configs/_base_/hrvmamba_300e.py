"""HRVMamba's recipe: DeiT's at half the learning rate, on images of 256 px, tested on all of the resized image."""

_base_ = ["./imagenet.py", "./deit_300e.py"]

train_pipeline = _base_.train_pipeline
train_pipeline[1]["scale"] = 256
test_pipeline = _base_.test_pipeline
test_pipeline[2]["crop_size"] = 256

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, begin=20, end=300, convert_to_iter_based=True),
]
