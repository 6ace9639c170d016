"""UPerNet with MambaVision-T on ADE20K at 512 px, 160,000 steps."""

_base_ = ["../_base_/upernet.py", "../_base_/ade20k.py", "../_base_/adamw_160k.py"]

model = dict(
    backbone=dict(
        model_name="mambavision_t",
        model_kwargs=dict(window_size=(64, 32)),
        pretrained="weights/mambavision_t.pth",
        out_norm=True,
        drop_path_rate=0.3,
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
