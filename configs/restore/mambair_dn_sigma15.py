"""mambair_dn: MambaIR that removes Gaussian noise of sigma 15 (of 255) from colour images, on eight processes.

1,600,000 steps of 16 crops of 128 px. Clean images of DIV2K, Flickr2K, WED, BSD500 in `data/dfwb/{train,val}/target/`;
for sigma 25 and 50 set both `noise`, and start from this one's weights.
"""

_base_ = ["../_base_/restore.py", "../_base_/sr_500k.py"]

model = dict(type="Restorer", model_name="mambair_dn", loss="charbonnier")

noise = 15 / 255
train_dataloader = dict(
    batch_size=2,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    dataset=dict(
        type="PairedImages",
        data_root="data/dfwb",
        data_prefix="train",
        channels=3,
        crop=128,
        rotate=True,
        noise=noise,
        length=160000,
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type="PairedImages", data_root="data/dfwb", data_prefix="val", channels=3, noise=noise),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(levels=255)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=160)  # of 10,000 steps each
param_scheduler = [dict(type="MultiStepLR", milestones=[80, 120, 140, 150], gamma=0.5)]
