"""mambairv2_l_x3: MambaIRv2 on DF2K, both parts in one folder; eight processes, from the weights of scale 2."""

_base_ = ["../_base_/sr_250k.py", "../_base_/div2k_x3.py"]

model = dict(type="Restorer", model_name="mambairv2_l_x3", pretrained="weights/mambairv2_l_x2.pth")
train_dataloader = dict(
    batch_size=4,
    dataset=dict(data_root="data/df2k", folders=("DF2K_train_LR_bicubic/X3", "DF2K_train_HR")),
)
