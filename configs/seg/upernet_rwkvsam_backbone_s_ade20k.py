"""UPerNet with RWKV-SAM's backbone S on ADE20K at 512 px, 160,000 steps.

ADE20K's recipe of the authors' tree; COCO's is VMamba's.
"""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="rwkvsam_backbone_s",
        pretrained="weights/rwkvsam_backbone_s.pth",
        out_norm=True,
    ),
    decode_head=dict(in_channels=[64, 128, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
