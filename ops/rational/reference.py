"""The group-wise rational function in plain PyTorch: the specification. Autograd gives its gradients."""

import torch

from ..tensors import state_dtype


def sign(x):
    """-1 for x < 0, else +1: also at 0, so that denominators initialised to 0 receive gradients."""
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))


def _magnitude(x):
    """``|x|``, with the slope of `sign` at 0."""
    return x * sign(x)


def _per_channel(coefficients, channels, dtype):
    """``(G or 1, K)`` to K tensors ``(channels,)``."""
    return coefficients.to(dtype).repeat_interleave(channels // coefficients.shape[0], 0).unbind(1)


def rational(x, numerator, denominator):
    """See `linzoo.ops.rational`."""
    dtype = state_dtype(x.dtype)
    x_, channels = x.to(dtype), x.shape[-1]
    P, Q = torch.zeros_like(x_), torch.ones_like(x_)
    for i, a in enumerate(_per_channel(numerator, channels, dtype)):
        P = P + a * x_**i
    for j, b in enumerate(_per_channel(denominator, channels, dtype), start=1):
        Q = Q + _magnitude(b) * _magnitude(x_) ** j
    return (P / Q).to(x.dtype)
