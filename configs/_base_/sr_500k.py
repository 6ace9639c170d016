"""MambaIR's recipe of super-resolution: 500,000 steps of 32 crops of 64 px, Adam at 2e-4, halved four times, L1."""

train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=5)  # of 5,000 steps each
optim_wrapper = dict(optimizer=dict(type="Adam", lr=2e-4, betas=(0.9, 0.99)))
param_scheduler = [dict(type="MultiStepLR", milestones=[50, 80, 90, 95], gamma=0.5)]
