"""Causal depthwise convolution along a scan order: the short convolution in front of Mamba's selective scan."""

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import forced_backend
from ..operator import Operator
from ..tensors import check, dense_rows, state_dtype
from . import cuda, reference

__all__ = ["causal_conv1d"]

TILE = 32  # steps that the CPU kernel takes at once
PARALLEL_TASKS = 16  # the CPU kernel splits the steps until it has about so many tasks


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    order: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution of each group's tokens with those before them in its scan order (Mamba, arXiv 2312.00752).

    For each batch item b, group g, channel c and step t, with K taps and zeros before the first step::

        y[b, order[g, t], g, c] = act(bias[g, c] + sum_k weight[g, c, k] x[b, order[g, t - K + 1 + k], g, c])

    On CUDA the `causal-conv1d` package computes it where it is installed; elsewhere our kernels do, which read the
    tokens where they lie. The CPU's has 2 to 4 taps; of others PyTorch's convolution takes its place.

    Args:
        x: ``(B, L, G, C)``; may be expanded over G.
        weight: ``(G, C, K)``.
        bias: ``(G, C)``; None for none.
        order: Integer ``(G, L)`` or ``(B, G, L)`` permutations, None for 0 .. L-1.
        activation: None or 'silu'.

    Returns:
        ``(B, L, G, C)`` in the dtype of `x`.

    Raises:
        ValueError: a shape does not fit, the activation is unknown, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(x=(x, "BLGC"), weight=(weight, "GCK"), bias=(bias, "GC"), order=(order, "GL"))
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    if x.is_cuda and forced_backend() is None and not torch.compiler.is_compiling() and (conv := _package()):
        run = functools.partial(_package_conv, conv=conv, activation=activation)
        return reference.causal_conv1d(x, weight, bias, order, run)
    dtype = state_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    return _operator(x, weight.to(dtype), bias, order, activation == "silu")


@functools.cache
def _package():
    try:
        return importlib.import_module("causal_conv1d").causal_conv1d_fn
    except (ImportError, AttributeError):
        return None


def _package_conv(x, weight, bias, conv, activation):
    """``(B, T, D)`` with ``(D, K)``, by `conv` of the `causal-conv1d` package."""
    bias = None if bias is None else bias.to(x.dtype)
    return conv(x.transpose(1, 2), weight.to(x.dtype), bias, activation=activation).transpose(1, 2)


def _composed(x, weight, bias, order, silu):
    y = reference.causal_conv1d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), order)
    return F.silu(y) if silu else y


def _kernel_inputs(x, weight, bias, order):
    bias = None if bias is None else bias.contiguous()
    return dense_rows(x), weight.contiguous(), bias, None if order is None else order.to(torch.int32).contiguous()


def _segment_steps(x):
    """Steps per task of the CPU kernel, whole tiles: from the problem's shape alone, not from the number of threads."""
    batch, length, groups, _ = x.shape
    segments = max(PARALLEL_TASKS // max(batch * groups, 1), 1)
    return -(-length // (segments * TILE)) * TILE


def _cpu_inputs(*inputs):
    x, weight, bias, order = _kernel_inputs(*inputs)
    return dict(x=x, weight=weight.mT.contiguous(), bias=bias, order=order, segment_steps=_segment_steps(x))


def _forward(backend, x, weight, bias, order, silu):
    if backend == "cuda":
        return cuda.forward(*_kernel_inputs(x, weight, bias, order), silu)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.linzoo_cpu.causal_conv1d_forward(**_cpu_inputs(x, weight, bias, order), silu=silu, y=y)
    return y


def _backward(backend, dy, x, weight, bias, order, silu):
    if backend == "cuda":
        grads = cuda.backward(dy, *_kernel_inputs(x, weight, bias, order), silu)
        return list(grads if bias is not None else grads[:2])
    named = _cpu_inputs(x, weight, bias, order)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = x.shape[0] * -(-x.shape[1] // named["segment_steps"])
    groups, channels, taps = weight.shape
    sums = weight.new_empty(parts, groups, taps + 1, channels)
    torch.ops.linzoo_cpu.causal_conv1d_backward(dy=dy.contiguous(), **named, silu=silu, dx=dx, sums=sums)
    sums = sums.sum(0)
    return [dx, sums[:, :taps].mT.contiguous(), *([] if bias is None else [sums[:, taps].contiguous()])]


def _limit(backend, x, weight, *_):
    return "its kernel has 2 to 4 taps" if backend == "cpu" and not 2 <= weight.shape[2] <= 4 else None


def _flops(x, weight, **_):
    """A multiply-add per tap and output."""
    return torch.Size(x).numel() * weight[2]


_operator = Operator(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu) -> Tensor y",
    kernel="causal_conv1d",
    reference=_composed,
    forward=_forward,
    backward=_backward,
    fake=lambda x, *_: x.new_empty(x.shape),
    flops=_flops,
    limit=_limit,
)
