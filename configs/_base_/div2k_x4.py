"""DIV2K at a scale of 4: `data/div2k/DIV2K_{train,valid}_{HR,LR_bicubic/X4}/`; PSNR and SSIM on Y."""

_base_ = ["./restore.py"]

train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(
        type="PairedImages",
        data_root="data/div2k",
        folders=("DIV2K_train_LR_bicubic/X4", "DIV2K_train_HR"),
        suffix="x4",
        channels=3,
        scale=4,
        crop=64,
        rotate=True,
        length=160000,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(
        type="PairedImages",
        data_root="data/div2k",
        folders=("DIV2K_valid_LR_bicubic/X4", "DIV2K_valid_HR"),
        suffix="x4",
        channels=3,
        scale=4,
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(levels=255, luma=True, border=4)
test_evaluator = val_evaluator
