"""UPerNet with ViM2-T on ADE20K at 512 px, 160,000 steps.

The authors released no such recipe: VMamba's is taken.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="vim2_t",
        pretrained="weights/vim2_t.pth",
        out_norm=True,
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
