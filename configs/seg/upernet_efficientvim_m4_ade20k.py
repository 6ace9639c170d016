"""UPerNet with EfficientViM-M4 on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="efficientvim_m4",
        pretrained=True,
        out_norm=True,
        out_indices=(0, 1, 2),
    ),
    decode_head=dict(in_channels=[224, 320, 512], in_index=[0, 1, 2]),
    auxiliary_head=dict(in_channels=320, in_index=1),
)
