"""Vim-S fine-tuned for 30 epochs on patches that overlap (stride 8), from what vim_s_in1k.py trained."""

_base_ = ["../_base_/imagenet.py", "../_base_/vim_310e.py"]

model = dict(
    model_name="vim_s_stride8",
    pretrained=True,
    pretrained_cfg_overlay=dict(file="work_dirs/vim_s_in1k/export/model.safetensors"),
)
train_dataloader = dict(sampler=dict(_delete_=True, type="RepeatAugSampler"))
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = []
