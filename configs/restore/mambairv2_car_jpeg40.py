"""mambairv2_car: MambaIRv2 that removes traces of JPEG compression of quality 40 from grey images, on eight processes.

1,600,000 steps of 16 crops of 126 px. Clean images of DIV2K, Flickr2K, WED, BSD500 in `data/dfwb/{train,val}/target/`;
for other qualities set both `jpeg`, and start from this one's weights: 800,000 steps at 1e-4.
"""

_base_ = ["../_base_/restore.py", "../_base_/sr_500k.py"]

model = dict(type="Restorer", model_name="mambairv2_car", loss="charbonnier")

quality = 40
train_dataloader = dict(
    batch_size=2,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(
        type="PairedImages",
        data_root="data/dfwb",
        data_prefix="train",
        channels=1,
        crop=126,
        rotate=True,
        jpeg=quality,
        length=160000,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type="PairedImages", data_root="data/dfwb", data_prefix="val", channels=1, jpeg=quality),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(levels=255)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=160)  # of 10,000 steps each
param_scheduler = [dict(type="MultiStepLR", milestones=[80, 120, 140, 150], gamma=0.5)]
