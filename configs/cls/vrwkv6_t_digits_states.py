"""The digits 5 to 9 from `vrwkv6_t_digits`: the states that the scans start from learn, and the classifier.

States learn at another rate than weights, without decay, and gradients are not clipped by a norm over both.
"""

_base_ = ["./vrwkv6_t_digits_full.py"]

model = dict(state_tuning=True)
optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(type="AdamW", lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0),
    paramwise_cfg=dict(custom_keys=dict(time_state=dict(lr_mult=100.0))),
)
