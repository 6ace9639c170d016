"""UPerNet with GroupMamba-T on ADE20K at 512 px, 160,000 steps.

The paper's tables name models and results, not the recipe: VMamba's is taken.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="groupmamba_t",
        pretrained="weights/groupmamba_t.pth",
        drop_path_rate=0.05,
    ),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
    auxiliary_head=dict(in_channels=348),
)
