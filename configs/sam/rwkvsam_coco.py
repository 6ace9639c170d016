"""RWKV-SAM on the masks of a COCO file; `data/coco/{train2017,val2017}/`, `data/coco/annotations/instances_*2017.json`.

Losses and points as the authors' joint training has them, which is on other data (COCONut, EntitySeg, DIS5K, SA-1B).
Optimizer, warm-up and cosine are those of their distillation; 12 epochs, the images a step and the loss of the score
are ours. To begin with weights of theirs:
`--cfg-options model.pretrained=True model.pretrained_cfg_overlay.file=FILE`.
"""

_base_ = ["../_base_/runtime.py"]

model = dict(type="PromptSegmenter", model_name="rwkvsam")

train_dataloader = dict(
    batch_size=2,
    num_workers=8,
    drop_last=True,
    dataset=dict(
        type="PromptedMasks",
        data_root="data/coco",
        ann_file="annotations/instances_train2017.json",
        data_prefix="train2017",
        most=8,
        augment=True,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="pseudo_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=8,
    dataset=dict(
        type="PromptedMasks",
        data_root="data/coco",
        ann_file="annotations/instances_val2017.json",
        data_prefix="val2017",
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="pseudo_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="PromptMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

max_epochs = 12
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, end=500),
    dict(type="CosineAnnealingLR", eta_min=1e-6, end=max_epochs, convert_to_iter_based=True),
]

default_hooks = dict(checkpoint=dict(save_best="prompt/box_mIoU"))
