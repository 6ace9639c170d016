"""M-VAR-d16 on ImageNet at 256 px by its published recipe: `torchrun --nproc_per_node=8`, 96 images each, with --amp.

The tokenizer is VAR's, `vae_ch160v4096z32.pth`. FID and IS need torch-fidelity.
"""

_base_ = ["../_base_/imagenet_256.py"]

model = dict(
    type="NextScale",
    model_name="mvar_d16",
    num_classes=1000,
    tokenizer=dict(model_name="mvar_tokenizer", pretrained="weights/vae_ch160v4096z32.pth"),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=288, edge="short", interpolation="lanczos", backend="pillow"),
    dict(type="RandomCrop", crop_size=256),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=96, dataset=dict(pipeline=train_pipeline))

max_epochs = 200
warm = max_epochs // 50
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=20)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=3e-4, betas=(0.9, 0.95), weight_decay=0.05),
    clip_grad=dict(max_norm=2.0),
)
# Constant for 5 % of what follows the warm-up, in whole epochs, then down to a tenth.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.005, end=warm, convert_to_iter_based=True),
    dict(
        type="LinearLR",
        start_factor=1,
        end_factor=0.1,
        begin=warm + (max_epochs - warm) // 20,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=768, enable=False)
