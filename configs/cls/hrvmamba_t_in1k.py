"""HRVMamba-T on ImageNet-1k by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/hrvmamba_300e.py"]

model = dict(model_name="hrvmamba_t", drop_path_rate=0.1)
train_dataloader = dict(batch_size=256)
auto_scale_lr = dict(base_batch_size=2048)
