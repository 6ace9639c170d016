"""swin_umamba on images of endoscopy, 7 instruments, from the first VMamba-T: AdamW, 350 epochs.

`data/endoscopy/{train,val}/{imagesTr,labelsTr}/`, NIfTI files of one slice, channels numbered as nnU-Net does. The
authors hold the encoder still for ten epochs, which this does not; the size of the crops is ours.
"""

_base_ = ["../_base_/volumes.py"]

crop = (384, 640)
data = dict(data_root="data/endoscopy", num_classes=8, spacing=None)
model = dict(
    type="VolumeSegmenter",
    model_name="swin_umamba",
    in_chans=3,
    deep_supervision=True,
    init_from=dict(model_name="vmamba_t_v0", pretrained=True),
    num_classes=8,
    window=crop,
)
train_dataloader = dict(dataset=dict(**data, crop=crop))
val_dataloader = dict(dataset=dict(**data))
test_dataloader = val_dataloader
val_evaluator = dict(num_classes=8)
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=350, val_interval=10)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.05), clip_grad=dict(max_norm=12)
)
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=1e-6, end=1000)]  # the rate would reach its end at 1000
