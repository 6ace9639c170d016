"""Group-wise rational function: the learnable activation of KAT."""

import torch
from torch import Tensor

from ..operator import Operator
from ..tensors import check, state_dtype
from . import cuda, reference

__all__ = ["rational"]

LANES = 128  # the CPU kernel walks this many channels at once
PARALLEL_TASKS = 64  # the CPU kernel splits the rows into about this many tasks


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Rational function of degree 5 over 4, with coefficients per group of channels (KAT, arXiv 2409.10594).

    ``y = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + ... + |b_4||x|^4)``. The denominator is a sum of absolute
    values, as in the authors' kernels; their paper writes the absolute value of a sum.

    Args:
        x: ``(..., C)``. float64, float32, bfloat16 or float16.
        numerator: a ``(G, 6)``, or ``(1, 6)`` if all groups share it. Group g is channels g C/G to (g + 1) C/G.
        denominator: b ``(G, 4)``, or ``(1, 4)``.

    Returns:
        ``(..., C)`` in the dtype of `x`, computed in float32 (float64 for float64). Gradients take the sign of 0 as +1,
        so that denominators initialised to 0 can learn.

    Raises:
        ValueError: a shape does not fit, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(x=(x, "*C"), numerator=(numerator, "G6"), denominator=(denominator, "K4"))
    for name, tensor in (("numerator", numerator), ("denominator", denominator)):
        if x.shape[-1] % tensor.shape[0]:
            raise ValueError(f"{name}: {tensor.shape[0]} groups do not divide the channels of x {tuple(x.shape)}")
    return _operator(x, *(t.to(state_dtype(x.dtype)) for t in (numerator, denominator)))


def _table(numerator, denominator, channels):
    """Coefficients per channel as the kernels read them, first a, then |b|: ``(10, channels)``."""
    parts = [t.repeat_interleave(channels // t.shape[0], 0) for t in (numerator, denominator.abs())]
    return torch.cat(parts, 1).t().contiguous()


def _split_rows(backend, x):
    """Rows per task. On the CPU they depend only on the problem's shape, so threads do not change results."""
    rows, channels = x.shape
    if backend == "cuda":
        return cuda.split_rows(rows, channels, x.device)
    splits = max(PARALLEL_TASKS // -(-channels // LANES), 1)
    return max(-(-rows // splits), 1)


def _forward(backend, x, numerator, denominator):
    rows = x.contiguous().view(-1, x.shape[-1])
    y = torch.empty_like(rows)
    table = _table(numerator, denominator, x.shape[-1])
    if backend == "cuda":
        cuda.forward(x=rows, table=table, split_rows=_split_rows(backend, rows), y=y)
    else:
        torch.ops.linzoo_cpu.rational_forward(rows, table, y)
    return y.view(x.shape)


def _backward(backend, dy, x, numerator, denominator):
    channels = x.shape[-1]
    rows, dy = x.contiguous().view(-1, channels), dy.contiguous().view(-1, channels)
    dx = torch.empty_like(rows)
    split_rows = _split_rows(backend, rows)
    table = _table(numerator, denominator, channels)
    sums = table.new_empty(-(-rows.shape[0] // split_rows), 10, channels)
    kernel = cuda.backward if backend == "cuda" else torch.ops.linzoo_cpu.rational_backward
    kernel(dy=dy, x=rows, table=table, split_rows=split_rows, dx=dx, sums=sums)
    sums = sums.sum(0).t()
    dnum = sums[:, :6].reshape(numerator.shape[0], -1, 6).sum(1)
    dden = sums[:, 6:].reshape(denominator.shape[0], -1, 4).sum(1) * reference.sign(denominator)
    return [dx.view(x.shape), dnum, dden]


def _flops(x, **_):
    """21 per element, 2 m + 2 n + 3 for degrees m = 5 and n = 4, as the paper counts."""
    return 21 * torch.Size(x).numel()


_operator = Operator(
    "rational",
    "(Tensor x, Tensor numerator, Tensor denominator) -> Tensor y",
    kernel="rational",
    reference=reference.rational,
    forward=_forward,
    backward=_backward,
    fake=lambda x, numerator, denominator: x.new_empty(x.shape),
    flops=_flops,
)
