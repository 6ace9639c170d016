"""nnU-Net's schedule: 1000 epochs of 250 steps, SGD with Nesterov's momentum at 0.01, which falls as a power."""

max_epochs = 1000
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=10)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5), clip_grad=dict(max_norm=12)
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0, end=max_epochs)]
