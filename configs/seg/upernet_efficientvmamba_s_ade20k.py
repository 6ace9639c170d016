"""UPerNet with EfficientVMamba-S on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="efficientvmamba_s",
        pretrained="weights/efficientvmamba_s.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
