"""DiMSUM-L/2 on ImageNet at 256 px by its published recipe: `torchrun --nproc_per_node=8`, 88 images each.

Latents are those of stabilityai/sd-vae-ft-ema, found as images are read. FID and IS need torch-fidelity.
"""

_base_ = ["../_base_/imagenet_256.py"]

model = dict(
    type="FlowMatching",
    model_name="dimsum_l_2",
    num_classes=1000,
    label_dropout=0.15,
    drop_path_rate=0.1,
    vae=dict(pretrained="stabilityai/sd-vae-ft-ema", scale=0.18215),
    guidance=1.4,
)
train_cfg = dict(by_epoch=True, max_epochs=500, val_interval=50)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0), clip_grad=dict(max_norm=1.0)
)
param_scheduler = []
auto_scale_lr = dict(base_batch_size=704, enable=False)
