"""S4's recipe for sequential CIFAR: AdamW at 0.01, at 0.001 without decay for the state matrices; plain images."""

_base_ = ["./runtime.py"]

model = dict(type="Classifier", num_classes=10, proj_drop_rate=0.1, loss=dict(type="CrossEntropyLoss"))

train_cfg = dict(by_epoch=True, max_epochs=200)
optim_wrapper = dict(constructor="TimmWeightDecay", optimizer=dict(type="AdamW", lr=1e-2, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0, begin=1, end=200, convert_to_iter_based=True),
]
