"""The same for scales of 3 and 4, from the weights of scale 2: half as many steps at half the rate.

The last halving is at 240,000 steps, not 237,500: epochs have 5,000.
"""

_base_ = ["./sr_500k.py"]

train_cfg = dict(max_epochs=50)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type="MultiStepLR", milestones=[25, 40, 45, 48], gamma=0.5)]
