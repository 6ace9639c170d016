"""rgt_x2: RGT on DF2K, both parts in one folder; four processes."""

_base_ = ["../_base_/sr_500k.py", "../_base_/div2k_x2.py"]

model = dict(type="Restorer", model_name="rgt_x2")
train_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root="data/df2k", folders=("DF2K_train_LR_bicubic/X2", "DF2K_train_HR")),
)
