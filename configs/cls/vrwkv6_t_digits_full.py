"""The digits 5 to 9 from `vrwkv6_t_digits`, all weights learning: what state tuning is compared with."""

_base_ = ["./vrwkv6_t_digits.py"]

model = dict(pretrained="work_dirs/state_tuning/low_digits/export/model.safetensors")
train_dataloader = dict(dataset=dict(data_root="data/high_digits", make="high_digits"))
val_dataloader = dict(dataset=dict(data_root="data/high_digits", make="high_digits"))
test_dataloader = val_dataloader
