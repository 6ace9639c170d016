"""Vim-T on ImageNet-1k by its published recipe, in float32: `torchrun --nproc_per_node=8`."""

_base_ = ["../_base_/imagenet.py", "../_base_/vim_310e.py"]

model = dict(model_name="vim_t", drop_path_rate=0.0)
train_dataloader = dict(batch_size=128, sampler=dict(_delete_=True, type="RepeatAugSampler"))
optim_wrapper = dict(optimizer=dict(lr=0.001, weight_decay=0.1))
