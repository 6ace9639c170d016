"""Deformable convolution without softmax, per group of channels: DCNv4."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backend import forced_backend, resolve
from ..selective_scan.reference import state_dtype
from . import cuda
from .reference import deform_conv as reference
from .reference import deform_conv_backward as reference_backward

__all__ = ["deform_conv"]

PARALLEL_TASKS = 8  # the backward kernel splits the rows until it has about so many tasks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def deform_conv(x, offset, weight, *, stride=1, padding=1, dilation=1, offset_scale=1.0):
    """Deformable convolution DCNv4 (arXiv 2401.06197, equation 2): weighted bilinear samples at learned offsets.

    For group g, which is channels g C/G to (g + 1) C/G, output pixel (r, c) and tap k = K i + j of a K x K window,
    i its column and j its row::

        y_g(r, c) = sum_k weight_k x_g(Y_k, X_k)
        X_k = c stride - padding + m + s ((i dilation - m) + offset_k,x)        m = dilation (K - 1) / 2, rounded down
        Y_k = r stride - padding + m + s ((j dilation - m) + offset_k,y)        s = offset_scale

    The weights are used as they are: no softmax. A sample is the bilinear mean of four pixels, where those outside the
    image count 0; a point not within (-1, H) x (-1, W) contributes nothing, and so does one that is not a number.

    Args:
        x: Map ``(B, H, W, C)``. float64, float32, bfloat16 or float16.
        offset: ``(B, H', W', G, K K, 2)``, x first, in pixels; H' and W' are those of an ordinary convolution.
        weight: ``(B, H', W', G, K K)``.
        stride, padding, dilation: Of the window before it is deformed, the same for both sides.
        offset_scale: Multiplies offsets and the window alike.

    Returns:
        ``(B, H', W', C)`` in the dtype of `x`, summed in float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, or an option is out of range.
        TypeError: a dtype is not supported.
        RuntimeError: tensors on different devices.
    """
    taps = offset.shape[-2] if offset.dim() == 6 else 0
    K = math.isqrt(taps)
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, H, W, C), got {tuple(x.shape)}")
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(f"stride, dilation, padding: expected >= 1, >= 1, >= 0, got {stride}, {dilation}, {padding}")
    if not taps or taps != K * K or offset.shape[-1] != 2:
        raise ValueError(f"offset: expected (B, H', W', G, K K, 2), got {tuple(offset.shape)}")
    B, H, W, C = x.shape
    G = offset.shape[3]
    size = [(n + 2 * padding - dilation * (K - 1) - 1) // stride + 1 for n in (H, W)]
    if min(size) < 1:
        raise ValueError(f"x: a {H} x {W} map is smaller than the window of {K} x {K} taps, dilation {dilation}")
    if not G or C % G:
        raise ValueError(f"offset: {G} groups do not divide the {C} channels of x")
    for name, tensor, shape in (("offset", offset, (B, *size, G, taps, 2)), ("weight", weight, (B, *size, G, taps))):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise RuntimeError(f"{name}: expected on {x.device} as x, got {tensor.device}")
    for name, tensor in (("x", x), ("offset", offset), ("weight", weight)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
    offset, weight = (t.to(state_dtype(x.dtype)) for t in (offset, weight))
    options = stride, padding, dilation, float(offset_scale)
    if forced_backend() == "export":
        return reference(x, offset, weight, *options)
    return torch.ops.linzoo.deform_conv(x, offset, weight, *options)


_OPTIONS = "int stride, int padding, int dilation, float offset_scale"
torch.library.define("linzoo::deform_conv", f"(Tensor x, Tensor offset, Tensor weight, {_OPTIONS}) -> Tensor")
torch.library.define(
    "linzoo::deform_conv_backward",
    f"(Tensor dy, Tensor x, Tensor offset, Tensor weight, {_OPTIONS}) -> (Tensor dx, Tensor doffset, Tensor dweight)",
)


def _dense_taps(offset, weight):
    """Both with contiguous taps; groups and pixels may be strided, as slices of one projection are."""
    if offset.stride()[-2:] != (2, 1):
        offset = offset.contiguous()
    return offset, weight if weight.stride(-1) == 1 else weight.contiguous()


def _forward(x, offset, weight, *options):
    backend = resolve("deform_conv", x.device)
    if backend == "reference":
        return reference(x, offset, weight, *options).contiguous()
    y = x.new_empty(*weight.shape[:3], x.shape[-1])
    kernel = cuda.forward if backend == "cuda" else torch.ops.linzoo_cpu.deform_conv_forward
    kernel(x.contiguous(), *_dense_taps(offset, weight), *options, y)
    return y


@torch.library.register_fake("linzoo::deform_conv")
def _forward_fake(x, offset, weight, *options):
    return x.new_empty(*weight.shape[:3], x.shape[-1])


def _backward(dy, x, offset, weight, *options):
    backend = resolve("deform_conv", x.device)
    if backend == "reference":
        return tuple(g.contiguous() for g in reference_backward(dy, x, offset, weight, *options))
    inputs = dy.contiguous(), x.contiguous(), *_dense_taps(offset, weight)
    if backend == "cuda":
        dx, doffset, dweight = cuda.backward(*inputs, *options)
        return dx.to(x.dtype), doffset, dweight
    doffset, dweight = offset.new_empty(offset.shape), weight.new_empty(weight.shape)
    B, rows, _, G, _ = weight.shape
    splits = min(
        max(PARALLEL_TASKS // max(B * G, 1), 1), rows
    )  # from the shape alone: results do not depend on threads
    dx = weight.new_empty(splits, *x.shape)
    torch.ops.linzoo_cpu.deform_conv_backward(*inputs, *options, dx, doffset, dweight)
    return dx.sum(0).to(x.dtype), doffset, dweight


@torch.library.register_fake("linzoo::deform_conv_backward")
def _backward_fake(dy, x, offset, weight, *options):
    return tuple(t.new_empty(t.shape) for t in (x, offset, weight))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _autograd(ctx, dy):
    return *torch.ops.linzoo.deform_conv_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None


torch.library.impl("linzoo::deform_conv", "default", _forward)
torch.library.impl("linzoo::deform_conv_backward", "default", _backward)
torch.library.register_autograd("linzoo::deform_conv", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.linzoo.deform_conv)
def _flops(x, offset, weight, *options, out_shape=None, **kwargs):
    """Four multiply-adds, one for each pixel of a bilinear sample, per tap, channel and output pixel."""
    B, rows, columns, _, taps = weight
    return 4 * taps * B * rows * columns * x[-1]


@register_flop_formula(torch.ops.linzoo.deform_conv_backward)
def _flops_backward(dy, *inputs, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * _flops(*inputs)
