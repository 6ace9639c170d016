"""UPerNet with HRVMamba-B on ADE20K at 512 px, 160,000 steps.

The maps are those of the four streams; the paper takes its classifier's neck along.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="hrvmamba_b",
        pretrained="weights/hrvmamba_b.pth",
        out_norm=True,
        drop_path_rate=0.15,
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
