"""UPerNet with KAT-S on ADE20K at 512 px, 160,000 steps.

The authors released no such recipe: VMamba's is taken.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="kat_small_patch16_224",
        pretrained=True,
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
