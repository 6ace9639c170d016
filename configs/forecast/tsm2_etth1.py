"""TSM2 (unverified) on ETTh1, 512 hours to 96, by a replication's recipe; the file as `data/ett/ETTh1.csv`."""

_base_ = ["../_base_/runtime.py"]

context, horizon = 512, 96
model = dict(type="Forecaster", model_name="tsm2", context=context, horizon=horizon)
data_preprocessor = dict(type="BaseDataPreprocessor")

series = dict(type="Series", data_root="data/ett", file="ETTh1.csv", context=context, horizon=horizon)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    dataset=dict(part="train", **series),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    dataset=dict(part="val", **series),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = dict(val_dataloader, dataset=dict(part="test", **series))
val_evaluator = dict(type="ForecastMetric")
test_evaluator = val_evaluator
val_cfg = dict()
test_cfg = dict()

max_epochs = 15
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)
optim_wrapper = dict(constructor="TimmWeightDecay", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.01))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=0, end=max_epochs, convert_to_iter_based=True)]
default_hooks = dict(
    checkpoint=dict(save_best="forecast/MSE", rule="less"),
    stop=dict(type="EarlyStoppingHook", monitor="forecast/MSE", rule="less", patience=5),
)
