"""The group-wise rational function in plain PyTorch: the specification; its gradients are autograd's."""

import torch

from ..tensors import state_dtype


def sign(x):
    """-1 where x < 0, else +1: also at 0, so that denominators that begin at 0 receive gradients."""
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))


def _magnitude(x):
    """``|x|``, whose slope at 0 is that of `sign`."""
    return x * sign(x)


def _per_channel(coefficients, channels, dtype):
    """``(G or 1, K)`` to K tensors ``(channels,)``."""
    return coefficients.to(dtype).repeat_interleave(channels // coefficients.shape[0], 0).unbind(1)


def rational(x, numerator, denominator):
    """See `linzoo.ops.rational`."""
    dtype = state_dtype(x.dtype)
    x_, channels = x.to(dtype), x.shape[-1]
    P = sum(a * x_**i for i, a in enumerate(_per_channel(numerator, channels, dtype)))
    b = _per_channel(denominator, channels, dtype)
    Q = 1 + sum(_magnitude(b_j) * _magnitude(x_) ** j for j, b_j in enumerate(b, start=1))
    return (P / Q).to(x.dtype)
