"""VideoMamba-T on Kinetics-400, 8 frames of a clip, by its published recipe: `torchrun --nproc_per_node=8`.

Clips are files or folders of frames in `data/kinetics400/{train,val}/<class>/`.
"""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="ClipClassifier",
    model_name="videomamba_t_video",
    num_classes=400,
    num_frames=8,
    drop_path_rate=0.1,
    pretrained="weights/videomamba_t.pth",
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
)
data_preprocessor = dict(type="BaseDataPreprocessor")

clips = dict(type="ClipFolder", data_root="data/kinetics400", num_frames=8, size=224)
train_dataloader = dict(
    batch_size=64,
    num_workers=8,
    drop_last=True,
    dataset=dict(**clips, data_prefix="train"),
    sampler=dict(type="RepeatAugSampler", num_repeats=2),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=8,
    dataset=dict(**clips, data_prefix="val", test_mode=True),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=70)
optim_wrapper = dict(
    constructor="TimmWeightDecay",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=70, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=512, enable=False)
