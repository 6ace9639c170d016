"""gdkvm on CAMUS: the left ventricle in ten frames of each half sequence; one process."""

_base_ = ["../_base_/tracking.py"]

model = dict(type="ClipSegmenter", model_name="gdkvm")

dataset = dict(type="MaskedClips", data_root="data/camus", layout="camus", num_frames=10, size=256)
train_dataloader = dict(
    batch_size=12,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(**dataset, part="training", augment=True, length=6000),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=4,
    dataset=dict(**dataset, part="validation"),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = dict(
    batch_size=4,
    num_workers=4,
    dataset=dict(**dataset, part="testing"),
    sampler=dict(type="DefaultSampler", shuffle=False),
)

# 3,000 steps, in epochs of 500.
train_cfg = dict(by_epoch=True, max_epochs=6, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-3),
    clip_grad=dict(max_norm=3.0),
    paramwise_cfg=dict(
        custom_keys={
            "image_encoder": dict(lr_mult=0.1),
            "mask_encoder.trunk": dict(lr_mult=0.1),
            "query_init": dict(decay_mult=0.0),
            "query_emb": dict(decay_mult=0.0),
        }
    ),
)
param_scheduler = [dict(type="MultiStepLR", milestones=[2, 4], gamma=0.1)]
