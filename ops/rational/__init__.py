"""Group-wise rational function: the learnable activation of KAT."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backend import forced_backend, resolve
from ..selective_scan.reference import state_dtype
from . import cuda
from .reference import rational as reference
from .reference import rational_backward as reference_backward
from .reference import sign

__all__ = ["rational"]

LANES = 128  # the CPU kernel walks this many channels at once
PARALLEL_TASKS = 64  # the CPU kernel splits the rows until it has about so many tasks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rational(x, numerator, denominator):
    """Rational function of degree 5 over 4 with coefficients per group of channels (KAT, arXiv 2409.10594).

    ``y = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + ... + |b_4||x|^4)``. The denominator is a sum of absolute
    values, as in the authors' kernels; their paper writes the absolute value of a sum.

    Args:
        x: ``(..., C)``. float64, float32, bfloat16 or float16.
        numerator: a ``(G, 6)``, or ``(1, 6)`` for one shared by all groups. Group g are channels g C/G to (g + 1) C/G.
        denominator: b ``(G, 4)``, or ``(1, 4)``.

    Returns:
        ``(..., C)`` in the dtype of `x`, computed in float32 (float64 for float64). Gradients take the sign of 0 as +1,
        so that denominators that begin at 0 learn.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not supported.
        RuntimeError: tensors on different devices.
    """
    for name, tensor, count in (("numerator", numerator, 6), ("denominator", denominator, 4)):
        if tensor.dim() != 2 or tensor.shape[1] != count:
            raise ValueError(f"{name}: expected (G, {count}) or (1, {count}), got {tuple(tensor.shape)}")
        if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % tensor.shape[0]:
            raise ValueError(f"{name}: {tensor.shape[0]} groups do not divide the channels of x {tuple(x.shape)}")
        if tensor.device != x.device:
            raise RuntimeError(f"{name}: expected on {x.device} as x, got {tensor.device}")
    for name, tensor in (("x", x), ("numerator", numerator), ("denominator", denominator)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
    numerator, denominator = (t.to(state_dtype(x.dtype)) for t in (numerator, denominator))
    if forced_backend() == "export":
        return reference(x, numerator, denominator)
    return torch.ops.linzoo.rational(x, numerator, denominator)


torch.library.define("linzoo::rational", "(Tensor x, Tensor numerator, Tensor denominator) -> Tensor")
torch.library.define(
    "linzoo::rational_backward",
    "(Tensor dy, Tensor x, Tensor numerator, Tensor denominator) -> (Tensor dx, Tensor dnum, Tensor dden)",
)


def _table(numerator, denominator, channels):
    """Coefficients per channel as the kernels read them: ``(10, channels)``, a and then |b|."""
    parts = [t.repeat_interleave(channels // t.shape[0], 0) for t in (numerator, denominator.abs())]
    return torch.cat(parts, 1).t().contiguous()


def _split_rows(rows, channels):
    """Rows per task of the CPU kernel: from the problem's shape alone, so that results do not depend on threads."""
    splits = max(PARALLEL_TASKS // -(-channels // LANES), 1)
    return max(-(-rows // splits), 1)


def _forward(x, numerator, denominator):
    backend = resolve("rational", x.device)
    if backend == "reference":
        return reference(x, numerator, denominator).contiguous()
    rows = x.contiguous().view(-1, x.shape[-1])
    y = torch.empty_like(rows)
    table = _table(numerator, denominator, x.shape[-1])
    split_rows = cuda.split_rows(*rows.shape, x.device) if backend == "cuda" else _split_rows(*rows.shape)
    kernel = cuda.forward if backend == "cuda" else torch.ops.linzoo_cpu.rational_forward
    kernel(rows, table, split_rows, y)
    return y.view(x.shape)


@torch.library.register_fake("linzoo::rational")
def _forward_fake(x, numerator, denominator):
    return x.new_empty(x.shape)


def _backward(dy, x, numerator, denominator):
    backend = resolve("rational", x.device)
    if backend == "reference":
        return tuple(g.contiguous() for g in reference_backward(dy, x, numerator, denominator))
    channels = x.shape[-1]
    rows, dy = x.contiguous().view(-1, channels), dy.contiguous().view(-1, channels)
    dx = torch.empty_like(rows)
    split_rows = cuda.split_rows(*rows.shape, x.device) if backend == "cuda" else _split_rows(*rows.shape)
    table = _table(numerator, denominator, channels)
    sums = table.new_empty(-(-rows.shape[0] // split_rows), 10, channels)
    kernel = cuda.backward if backend == "cuda" else torch.ops.linzoo_cpu.rational_backward
    kernel(dy, rows, table, split_rows, dx, sums)
    sums = sums.sum(0).t()
    dnum = sums[:, :6].reshape(numerator.shape[0], -1, 6).sum(1)
    dden = sums[:, 6:].reshape(denominator.shape[0], -1, 4).sum(1) * sign(denominator)
    return dx.view(x.shape), dnum, dden


@torch.library.register_fake("linzoo::rational_backward")
def _backward_fake(dy, x, numerator, denominator):
    return tuple(t.new_empty(t.shape) for t in (x, numerator, denominator))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return torch.ops.linzoo.rational_backward(dy, *ctx.saved_tensors)


torch.library.impl("linzoo::rational", "default", _forward)
torch.library.impl("linzoo::rational_backward", "default", _backward)
torch.library.register_autograd("linzoo::rational", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.linzoo.rational)
def _flops(x, numerator, denominator, *, out_shape=None, **kwargs):
    """21 per element, 2 m + 2 n + 3 for degrees m = 5 and n = 4: the count of the paper."""
    return 21 * torch.Size(x).numel()


@register_flop_formula(torch.ops.linzoo.rational_backward)
def _flops_backward(dy, x, *coefficients, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * 21 * torch.Size(x).numel()
