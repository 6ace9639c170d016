"""ViL-T after `cls/vil_t_in1k`, fine-tuned at 224 px by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["./vil_t_in1k.py"]

model = dict(img_size=224, pretrained="work_dirs/vil_t_in1k/export/model.safetensors")
train_pipeline = _base_.train_pipeline
train_pipeline[1]["scale"] = 224
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"] = test_pipeline[2]["crop_size"] = 224
train_dataloader = dict(batch_size=128, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=20)
optim_wrapper = dict(optimizer=dict(lr=1e-5))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=20, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=1024)
