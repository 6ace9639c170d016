"""DIV2K at a scale of 4: `data/div2k/DIV2K_{train,valid}_{HR,LR_bicubic/X4}/`; PSNR and SSIM on Y."""

_base_ = ["./div2k_x2.py"]

train_dataloader = dict(
    dataset=dict(folders=("DIV2K_train_LR_bicubic/X4", "DIV2K_train_HR"), suffix="x4", scale=4),
)
val_dataloader = dict(
    dataset=dict(folders=("DIV2K_valid_LR_bicubic/X4", "DIV2K_valid_HR"), suffix="x4", scale=4),
)
test_dataloader = val_dataloader
val_evaluator = dict(border=4)
test_evaluator = val_evaluator
