"""gdkvm_small_r18 follows beating shapes on photographs, given the first mask: minutes on two CPU cores."""

_base_ = ["../_base_/tracking.py"]

model = dict(
    type="ClipSegmenter",
    model_name="gdkvm_small_r18",
    decay="exp",
    first_mask=True,
    frames="all",
    num_points=1024,
)

dataset = dict(type="MaskedClips", data_root="data/beating", make="beating", size=64)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(**dataset, part="train", num_frames=5, augment=True, length=200),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(**dataset, part="val", num_frames=10),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(frames="later")
test_evaluator = val_evaluator

max_epochs = 5
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=3e-4, weight_decay=1e-3),
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=max_epochs, convert_to_iter_based=True),
]

default_hooks = dict(logger=dict(interval=10))
