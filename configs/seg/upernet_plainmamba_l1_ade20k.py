"""UPerNet with PlainMamba-L1 on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="plainmamba_l1",
        pretrained="weights/plainmamba_l1.pth",
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
