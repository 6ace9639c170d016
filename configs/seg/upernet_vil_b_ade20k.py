"""UPerNet with ViL-B on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="vil_b",
        pretrained="weights/vil_b.pth",
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
