"""The digits 5 to 9 from `vrwkv6_t_digits`, the classifier alone learning."""

_base_ = ["./vrwkv6_t_digits_full.py"]

custom_hooks = [dict(type="FreezeHook")]
optim_wrapper = dict(optimizer=dict(lr=1e-2))
