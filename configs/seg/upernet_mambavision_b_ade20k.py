"""UPerNet with MambaVision-B on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="mambavision_b",
        model_kwargs=dict(window_size=(64, 32)),
        pretrained="weights/mambavision_b.pth",
        out_norm=True,
        drop_path_rate=0.4,
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
