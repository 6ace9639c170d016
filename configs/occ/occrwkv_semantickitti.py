"""OccRWKV on SemanticKITTI by its published recipe.

The voxels of scene completion are in `data/semantickitti/sequences/<nn>/voxels/<scene>.{bin,label,invalid}`.

80 epochs of 2 scenes a step, Adam 1e-3, which each epoch lowers by 2 %. Class counts: those of LMSCNet's code, which
the authors' builds on.
"""

_base_ = ["../_base_/runtime.py"]

model = dict(
    type="SceneCompleter",
    model_name="occrwkv",
    class_counts=[
        5.41773033e9, 1.57835390e7, 1.25136000e5, 1.18809000e5, 6.46799000e5, 8.21951000e5, 2.62978000e5,
        2.83696000e5, 2.04750000e5, 6.16887030e7, 4.50296100e6, 4.48836500e7, 2.26992300e6, 5.68402180e7,
        1.57196520e7, 1.58442623e8, 2.06162300e6, 3.69705220e7, 1.15198800e6, 3.34146000e5,
    ],
)  # fmt: skip

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    drop_last=True,
    dataset=dict(
        type="VoxelScenes",
        data_root="data/semantickitti",
        sequences=["00", "01", "02", "03", "04", "05", "06", "07", "09", "10"],
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type="VoxelScenes", data_root="data/semantickitti", sequences=["08"]),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="OccupancyMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=80)
optim_wrapper = dict(optimizer=dict(type="Adam", lr=1e-3, betas=(0.9, 0.999)))
param_scheduler = [dict(type="ExponentialLR", gamma=0.98, end=80)]

default_hooks = dict(checkpoint=dict(save_best="occupancy/mIoU"))
