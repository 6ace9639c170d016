"""Causal depthwise convolution along a scan order: the short convolution in front of Mamba's selective scan."""

import functools

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ..backend import forced_backend, resolve
from ..selective_scan.reference import state_dtype
from . import cuda
from .reference import causal_conv1d as reference

__all__ = ["causal_conv1d"]


def causal_conv1d(x, weight, bias=None, *, order=None, activation=None):
    """Depthwise convolution of each group's tokens with those before them in its scan order (Mamba, arXiv 2312.00752).

    For each batch item b, group g, channel c and step t, with K taps and zeros before the first step::

        y[b, order[g, t], g, c] = act(bias[g, c] + sum_k weight[g, c, k] x[b, order[g, t - K + 1 + k], g, c])

    On CUDA the `causal-conv1d` package computes it where it is installed; elsewhere our kernel does, which reads the
    tokens where they lie. On the CPU it is PyTorch's convolution.

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
    if x.is_cuda and forced_backend() is None and not torch.compiler.is_compiling() and _package() is not None:
        return reference(x, weight, bias, order, functools.partial(_package_conv, activation=activation))
    if x.is_cuda and forced_backend() in (None, "cuda"):
        dtype = state_dtype(x.dtype)
        bias = None if bias is None else bias.to(dtype)
        return torch.ops.linzoo.causal_conv1d(x, weight.to(dtype), bias, order, activation == "silu")
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


# Registration of what serves CUDA tensors; elsewhere autograd sees PyTorch's own operators.

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu"
torch.library.define("linzoo::causal_conv1d", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "linzoo::causal_conv1d_backward", f"(Tensor dy, {_INPUTS}) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _composed(x, weight, bias, order, silu):
    y = reference(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), order)
    return F.silu(y) if silu else y


def _kernel_inputs(x, weight, bias, order):
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    return x, weight.contiguous(), bias, None if order is None else order.to(torch.int32).contiguous()


def _forward(x, weight, bias, order, silu):
    if resolve("causal_conv1d", x.device) == "reference":
        return _composed(x, weight, bias, order, silu).contiguous()
    return cuda.forward(*_kernel_inputs(x, weight, bias, order), silu)


@torch.library.register_fake("linzoo::causal_conv1d")
def _forward_fake(x, weight, bias, order, silu):
    return x.new_empty(x.shape)


def _backward(dy, x, weight, bias, order, silu):
    if resolve("causal_conv1d", x.device) != "reference":
        return cuda.backward(dy, *_kernel_inputs(x, weight, bias, order), silu)
    with torch.enable_grad():
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = _composed(*inputs, order, silu)
    return tuple(g.contiguous() for g in torch.autograd.grad(y, inputs, dy))


@torch.library.register_fake("linzoo::causal_conv1d_backward")
def _backward_fake(dy, x, weight, bias, order, silu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.has_bias = tensors[2] is not None
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy):
    dx, dweight, dbias = torch.ops.linzoo.causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu)
    return dx, dweight, dbias if ctx.has_bias else None, None, None


torch.library.impl("linzoo::causal_conv1d", "default", _forward)
torch.library.impl("linzoo::causal_conv1d_backward", "default", _backward)
torch.library.register_autograd("linzoo::causal_conv1d", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.linzoo.causal_conv1d)
def _flops(x, weight, *args, out_shape=None, **kwargs):
    """A multiply-add per tap and output."""
    return 2 * torch.Size(x).numel() * weight[2]


@register_flop_formula(torch.ops.linzoo.causal_conv1d_backward)
def _flops_backward(dy, *inputs, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * _flops(*inputs)
