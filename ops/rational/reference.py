"""The group-wise rational function in plain PyTorch: the specification."""

import torch

from ..selective_scan.reference import state_dtype


def sign(x):
    """-1 where x < 0, else +1: also at 0, so that denominators that begin at 0 receive gradients."""
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))


def _per_channel(coefficients, channels, dtype):
    """``(G or 1, K)`` to K tensors ``(channels,)``."""
    return coefficients.to(dtype).repeat_interleave(channels // coefficients.shape[0], 0).unbind(1)


def _polynomials(x, numerator, denominator):
    """P, Q, and P'(x), and Q' without its sign, at every element."""
    dtype = state_dtype(x.dtype)
    x = x.to(dtype)
    a = _per_channel(numerator, x.shape[-1], dtype)
    b = [c.abs() for c in _per_channel(denominator, x.shape[-1], dtype)]
    P = sum(a_i * x**i for i, a_i in enumerate(a))
    Q = 1 + sum(b_j * x.abs() ** j for j, b_j in enumerate(b, start=1))
    R = sum(i * a_i * x ** (i - 1) for i, a_i in enumerate(a) if i)
    S = sum(j * b_j * x.abs() ** (j - 1) for j, b_j in enumerate(b, start=1))
    return x, P, Q, R, S


def rational(x, numerator, denominator):
    """See `linzoo.ops.rational`."""
    _, P, Q, _, _ = _polynomials(x, numerator, denominator)
    return (P / Q).to(x.dtype)


def rational_backward(dy, x, numerator, denominator):
    """Gradients of `rational`: of x, numerator and denominator."""
    dtype, dy = x.dtype, dy.to(state_dtype(x.dtype))
    x, P, Q, R, S = _polynomials(x, numerator, denominator)
    dx = dy * (R / Q - sign(x) * S * P / Q**2)
    over_channels = [(dy * x**i / Q).flatten(0, -2).sum(0) for i in range(numerator.shape[1])]
    dnum = _sum_groups(torch.stack(over_channels, 1), numerator)
    over_channels = [(-dy * P / Q**2 * x.abs() ** j).flatten(0, -2).sum(0) for j in range(1, denominator.shape[1] + 1)]
    dden = _sum_groups(torch.stack(over_channels, 1), denominator) * sign(denominator)
    return dx.to(dtype), dnum, dden.to(denominator.dtype)


def _sum_groups(per_channel, coefficients):
    """``(channels, K)`` to the coefficients' ``(G or 1, K)``."""
    return per_channel.unflatten(0, (coefficients.shape[0], -1)).sum(1).to(coefficients.dtype)
