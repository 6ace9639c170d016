"""Deformable convolution without softmax, with offsets per group of channels: DCNv4."""

import functools
import math

import torch
from torch import Tensor

from ..operator import Operator
from ..tensors import check, dense_rows, state_dtype
from . import cuda, reference

__all__ = ["deform_conv"]

PARALLEL_TASKS = 8  # the backward kernel splits the rows into about this many tasks


def deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
) -> Tensor:
    """Deformable convolution DCNv4 (arXiv 2401.06197, equation 2): weighted bilinear samples at learned offsets.

    For group g, which is channels g C/G to (g + 1) C/G, output pixel (r, c) and tap k = K i + j of a K x K window,
    i its column and j its row::

        y_g(r, c) = sum_k weight_k x_g(Y_k, X_k)
        X_k = c stride - padding + m + s ((i dilation - m) + offset_k,x)        m = dilation (K - 1) / 2, rounded down
        Y_k = r stride - padding + m + s ((j dilation - m) + offset_k,y)        s = offset_scale

    The weights are used as they are, without softmax. A sample is the bilinear mean of four pixels; pixels outside the
    image count as 0. A point outside (-1, H) x (-1, W) contributes nothing, and neither does NaN.

    Args:
        x: Map ``(B, H, W, C)``. float64, float32, bfloat16 or float16.
        offset: ``(B, H', W', G, K K, 2)``, x first, in pixels. H' and W' are those of an ordinary convolution.
        weight: ``(B, H', W', G, K K)``.
        stride, padding, dilation: Of the window before it is deformed, the same for height and width.
        offset_scale: Multiplies both the offsets and the window.

    Returns:
        ``(B, H', W', C)`` in the dtype of `x`, summed in float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, an option is out of range, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    # Axes h and w are the output's, K the taps.
    sizes = check(x=(x, "BHWC"), offset=(offset, "BhwGK2"), weight=(weight, "BhwGK"))
    H, W, C, G, taps = (sizes[axis] for axis in "HWCGK")
    K = math.isqrt(taps)
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(f"stride, dilation, padding: expected >= 1, >= 1, >= 0, got {stride}, {dilation}, {padding}")
    if taps != K * K:
        raise ValueError(f"offset: expected K x K taps, got {taps} in {tuple(offset.shape)}")
    size = [(n + 2 * padding - dilation * (K - 1) - 1) // stride + 1 for n in (H, W)]
    if min(size) < 1:
        raise ValueError(f"x: a {H} x {W} map is smaller than the window of {K} x {K} taps, dilation {dilation}")
    if C % G:
        raise ValueError(f"offset: {G} groups do not divide the {C} channels of x")
    if [sizes["h"], sizes["w"]] != size:
        raise ValueError(f"offset: expected (B, {size[0]}, {size[1]}, G, K K, 2), got {tuple(offset.shape)}")
    if not offset.dtype == weight.dtype == x.dtype:
        offset, weight = (t.to(state_dtype(x.dtype)) for t in (offset, weight))
    return _operator(x, offset, weight, stride, padding, dilation, float(offset_scale))


def _dense_taps(offset, weight):
    """Both with contiguous taps. Groups and pixels may be strided, like slices of one projection."""
    if offset.stride()[-2:] != (2, 1):
        offset = offset.contiguous()
    return offset, dense_rows(weight)


def _wide_taps(offset, weight):
    """Both in the dtype of the sums, as the CUDA kernels need them."""
    return _dense_taps(*(t.to(state_dtype(t.dtype)) for t in (offset, weight)))


def _forward(backend, x, offset, weight, *options):
    y = x.new_empty(*weight.shape[:3], x.shape[-1])
    if backend == "cuda":
        cuda.forward(x.contiguous(), *_wide_taps(offset, weight), *options, y)
    else:
        torch.ops.linzoo_cpu.deform_conv_forward(x.contiguous(), *_dense_taps(offset, weight), *options, y)
    return y


def _backward(backend, dy, x, offset, weight, *options):
    dy, x = dy.contiguous(), x.contiguous()
    if backend == "cuda":
        grads = cuda.backward(dy, x, *_wide_taps(offset, weight), *options)
    else:
        B, rows, _, G, _ = weight.shape
        splits = min(max(PARALLEL_TASKS // max(B * G, 1), 1), rows)  # from the shape only: whatever the threads
        shapes = (splits, *x.shape), offset.shape, weight.shape
        dx, *dtaps = (x.new_empty(shape, dtype=state_dtype(x.dtype)) for shape in shapes)
        torch.ops.linzoo_cpu.deform_conv_backward(dy, x, *_dense_taps(offset, weight), *options, dx, *dtaps)
        grads = dx.sum(0), *dtaps
    return [grad.to(t.dtype) for grad, t in zip(grads, (x, offset, weight), strict=True)]


def _flops(x, weight, **_):
    """Four multiply-adds (one per pixel of a bilinear sample) per tap, channel and output pixel."""
    B, rows, columns, _, taps = weight
    return 4 * taps * B * rows * columns * x[-1]


_operator = Operator(
    "deform_conv",
    "(Tensor x, Tensor offset, Tensor weight, int stride, int padding, int dilation, float offset_scale) -> Tensor y",
    kernel="deform_conv",
    reference=reference.deform_conv,
    forward=_forward,
    backward=_backward,
    fake=lambda x, offset, weight, *options: x.new_empty(*weight.shape[:3], x.shape[-1]),
    flops=_flops,
    export=functools.partial(reference.deform_conv, sample=reference.grid_sample),
)
