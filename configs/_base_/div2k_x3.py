"""DIV2K at a scale of 3: `data/div2k/DIV2K_{train,valid}_{HR,LR_bicubic/X3}/`; PSNR and SSIM on Y."""

_base_ = ["./div2k_x2.py"]

train_dataloader = dict(
    dataset=dict(folders=("DIV2K_train_LR_bicubic/X3", "DIV2K_train_HR"), suffix="x3", scale=3),
)
val_dataloader = dict(
    dataset=dict(folders=("DIV2K_valid_LR_bicubic/X3", "DIV2K_valid_HR"), suffix="x3", scale=3),
)
test_dataloader = val_dataloader
val_evaluator = dict(border=3)
test_evaluator = val_evaluator
