"""UPerNet with S4ND-ConvNeXt-T on ADE20K at 512 px, 160,000 steps.

The authors trained no such model: VMamba's recipe is taken.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="s4nd_convnext_tiny",
        pretrained="weights/s4nd_convnext_tiny.pth",
        out_norm=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
