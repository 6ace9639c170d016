"""Causal depthwise convolution along a scan order: the short convolution in front of Mamba's selective scan."""

import functools

import torch
import torch.nn.functional as F

from ..backend import forced_backend
from .reference import causal_conv1d as reference

__all__ = ["causal_conv1d"]


def causal_conv1d(x, weight, bias=None, *, order=None, activation=None):
    """Depthwise convolution of each group's tokens with those before them in its scan order (Mamba, arXiv 2312.00752).

    For each batch item b, group g, channel c and step t, with K taps and zeros before the first step::

        y[b, order[g, t], g, c] = act(bias[g, c] + sum_k weight[g, c, k] x[b, order[g, t - K + 1 + k], g, c])

    On CUDA the `causal-conv1d` package computes it where it is installed; everywhere else it is PyTorch's convolution.

    Args:
        x: ``(B, L, G, C)``; may be expanded over G.
        weight: ``(G, C, K)``.
        bias: ``(G, C)``; None for none.
        order: Integer ``(G, L)`` or ``(B, G, L)`` permutations, None for 0 .. L-1.
        activation: None or 'silu'.

    Returns:
        ``(B, L, G, C)`` in the dtype of `x`.

    Raises:
        ValueError: a shape does not fit, or the activation is unknown.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, L, G, C), got {tuple(x.shape)}")
    batch, length, groups, channels = x.shape
    if weight.dim() != 3 or weight.shape[0] != groups or weight.shape[1] != channels:
        raise ValueError(f"weight: expected (G, C, K) beside x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and (bias.dim() != 2 or bias.shape[0] != groups or bias.shape[1] != channels):
        raise ValueError(f"bias: expected (G, C) beside x {tuple(x.shape)}, got {tuple(bias.shape)}")
    if order is not None:
        fits = order.dim() in (2, 3) and order.shape[-2] == groups and order.shape[-1] == length
        if not fits or (order.dim() == 3 and order.shape[0] != batch):
            raise ValueError(f"order: expected (G, L) or (B, G, L) beside x {tuple(x.shape)}, got {tuple(order.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    if (
        x.is_cuda
        and forced_backend() in (None, "cuda")
        and not torch.compiler.is_compiling()
        and _package() is not None
    ):
        return reference(x, weight, bias, order, functools.partial(_package_conv, activation=activation))
    y = reference(x, weight, bias, order)
    return F.silu(y) if activation else y


@functools.cache
def _package():
    try:
        import causal_conv1d as package
    except ImportError:
        return None
    return package


def _package_conv(x, weight, bias, activation):
    """``(B, T, D)`` with ``(D, K)``, by the `causal-conv1d` package."""
    bias = None if bias is None else bias.to(x.dtype)
    y = _package().causal_conv1d_fn(x.transpose(1, 2), weight.to(x.dtype), bias, activation=activation)
    return y.transpose(1, 2)
