"""UPerNet with PlainMamba-L3 on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="plainmamba_l3",
        pretrained="weights/plainmamba_l3.pth",
        drop_path_rate=0.4,
    ),
    decode_head=dict(in_channels=[448, 448, 448, 448]),
    auxiliary_head=dict(in_channels=448),
)
