"""300 epochs of AdamW at 1,024 images a step (8 x 128): 20 of warm-up, cosine to 1 %, clipped gradients."""

_base_ = ["./runtime.py"]

model = dict(
    type="Classifier",
    num_classes=1000,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
)

train_cfg = dict(by_epoch=True, max_epochs=300)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=20, end=300, convert_to_iter_based=True),
]
# `--cfg-options auto_scale_lr.enable=True` scales the learning rate to another number of images a step.
auto_scale_lr = dict(base_batch_size=1024, enable=False)
