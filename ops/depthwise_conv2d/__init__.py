"""Depthwise convolution of channel-last maps: every channel with a kernel of its own."""

import math

import torch
from torch import Tensor

from ..operator import Operator
from ..tensors import check, dense_rows, state_dtype
from . import reference

__all__ = ["depthwise_conv2d"]

PATCH = 1024  # vectors of channels that a task of the CPU kernel holds, about


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
) -> Tensor:
    """Depthwise convolution, as PyTorch's `conv2d` with one group per channel, of channel-last maps::

        y[b, r, c, d] = bias[d] + sum_ij weight[d, i, j] x[b, r + dilation i - padding, c + dilation j - padding, d]

    with zeros outside the map. PyTorch's convolution runs. On the CPU its gradient for the weights of wide or dilated
    windows takes several times as long as all the rest: there a kernel of ours takes its place, and the gradient for
    the map is a convolution with the window turned round.

    Args:
        x: Map ``(B, H, W, C)``. float64, float32, bfloat16 or float16.
        weight: ``(C, K, K')``.
        bias: ``(C,)``; None for none.
        padding: Zeros around the map, the same for both axes or of each.
        dilation: Distance between taps, in pixels.

    Returns:
        ``(B, H', W', C)`` in the dtype of `x`, or autocast's; H' = H + 2 padding - dilation (K - 1). Sums are float32
        (float64 for float64).

    Raises:
        ValueError: a shape does not fit, an option is out of range, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    sizes = check(x=(x, "BHWC"), weight=(weight, "CKJ"), bias=(bias, "C"))
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    if min(rows, columns) < 0 or dilation < 1:
        raise ValueError(f"padding, dilation: expected >= 0, >= 1, got {padding}, {dilation}")
    if min(_output(x.shape, weight.shape, rows, columns, dilation)) < 1:
        window = f"window of {sizes['K']} x {sizes['J']} taps, dilation {dilation}"
        raise ValueError(f"x: a {sizes['H']} x {sizes['W']} map with padding {padding} is smaller than the {window}")
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    run = _operator if _slow_backward(x, weight, rows, columns, dilation) else reference.depthwise_conv2d
    return run(x, weight, bias, rows, columns, dilation)


def _output(x, weight, pad_rows, pad_columns, dilation):
    """Height and width, from shapes."""
    (_, H, W, _), (_, K, J) = x, weight
    return H + 2 * pad_rows - dilation * (K - 1), W + 2 * pad_columns - dilation * (J - 1)


def _slow_backward(x, weight, pad_rows, pad_columns, dilation):
    """Whether gradients will be asked for, by PyTorch as it is, that our kernel computes in less time."""
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    K, J = weight.shape[1:]
    return (dilation > 1 or K * J > 9) and pad_rows <= dilation * (K - 1) and pad_columns <= dilation * (J - 1)


def _backward(backend, dy, x, weight, bias, pad_rows, pad_columns, dilation):
    K, J = weight.shape[1:]
    reach, across = dilation * (K - 1), dilation * (J - 1)
    dx = reference.depthwise_conv2d(dy, weight.flip(1, 2), None, reach - pad_rows, across - pad_columns, dilation)
    band = max(PATCH // (dy.shape[2] + across) - reach, 4)  # output rows of a task, from the problem's shape alone
    sums = torch.empty(x.shape[0] * -(-dy.shape[1] // band), K * J + 1, x.shape[3], dtype=state_dtype(x.dtype))
    window = dict(kernel_rows=K, kernel_columns=J, pad_rows=pad_rows, pad_columns=pad_columns, dilation=dilation)
    kernel = torch.ops.linzoo_cpu.depthwise_conv2d_backward
    kernel(dy=dense_rows(dy), x=dense_rows(x), **window, band=band, sums=sums)
    sums = sums.sum(0).t().to(weight.dtype)
    grads = [dx, sums[:, :-1].reshape(weight.shape)]
    return grads if bias is None else [*grads, sums[:, -1].contiguous()]


def _empty(x, weight, bias, *window):
    return x.new_empty(x.shape[0], *_output(x.shape, weight.shape, *window), x.shape[3])


def _flops(x, weight, pad_rows, pad_columns, dilation, **_):
    """A multiply-add per tap and output."""
    return x[0] * math.prod(_output(x, weight, pad_rows, pad_columns, dilation)) * math.prod(weight)


_operator = Operator(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int pad_rows, int pad_columns, int dilation) -> Tensor y",
    kernel="depthwise_conv2d",
    devices=("cpu",),
    reference=reference.depthwise_conv2d,
    backward=_backward,
    fake=_empty,
    flops=_flops,
)
