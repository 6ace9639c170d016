"""UPerNet with MambaVision-S on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="mambavision_s",
        model_kwargs=dict(window_size=(160, 56)),
        pretrained="weights/mambavision_s.pth",
        out_norm=True,
        drop_path_rate=0.7,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
