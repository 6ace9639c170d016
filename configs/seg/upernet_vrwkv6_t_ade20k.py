"""UPerNet with Vision-RWKV6-T on ADE20K at 512 px, 160,000 steps.

The authors published no such model: Vision-RWKV's recipe, without its adapter.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="vrwkv6_t",
        pretrained=True,
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
