"""rgt_x4: RGT on DF2K, both parts in one folder; four processes, from the weights of scale 2."""

_base_ = ["../_base_/sr_500k.py", "../_base_/div2k_x4.py"]

model = dict(type="Restorer", model_name="rgt_x4", pretrained="weights/rgt_x2.pth")
train_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root="data/df2k", folders=("DF2K_train_LR_bicubic/X4", "DF2K_train_HR")),
)
