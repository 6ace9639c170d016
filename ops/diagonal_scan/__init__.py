"""Complex diagonal recurrence: the scan of S5 and ConvS5."""

import torch
from torch import Tensor

from ..operator import Operator
from ..tensors import check, state_dtype
from . import cuda, reference

__all__ = ["diagonal_scan"]


def diagonal_scan(a: Tensor, b: Tensor, initial: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t``, elementwise over complex states (S5, arXiv 2208.04933, section 2.2).

    Complex tensors hold (re, im) on their last axis. Projections into and out of the states are then real matrix
    products, also in half precision.

    Args:
        a: Gains ``(..., P, 2)``. Shape: that of `b` (a gain per step), that of `b` without batch and time, or only its
            last dimensions, shared along the others. float64, float32, bfloat16 or float16.
        b: Inputs ``(B, L, ..., P, 2)``: L steps along the second axis.
        initial: The state before the first step ``(B, ..., P, 2)``; None for 0.
        reverse: Scan from the last step to the first: ``h_t = a_t h_{t+1} + b_t``.

    Returns:
        The states ``(B, L, ..., P, 2)`` in the dtype of `b`. `a`, `initial` and the running state are float32 (float64
        for float64).

    Raises:
        ValueError: a shape does not fit, L is 0, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
        RuntimeError: a forced backend cannot run it.
    """
    check(b=(b, "BL*P2"), initial=(initial, "B*P2"))
    inner = tuple(b.shape[2:])
    shared = isinstance(a, Tensor) and 2 <= a.dim() < b.dim() and tuple(a.shape) == inner[len(inner) - a.dim() :]
    check(b=(b, "BL*P2"), initial=(initial, "B*P2"), a=(a.expand(b.shape) if shared else a, "BL*P2"))
    dtype = state_dtype(b.dtype)
    a = (a.expand(inner) if shared else a).to(dtype)
    a = a.flatten(0, -2) if shared else a.flatten(2, -2)
    initial = None if initial is None else initial.to(dtype).flatten(1, -2)
    return _operator(a, b.flatten(2, -2), initial, reverse).view(b.shape)


# Here the axes between time and (re, im) are one axis M. The backward pass reads the output, not the input.


def _forward(backend, a, b, initial, reverse):
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    initial = None if initial is None else initial.contiguous()
    kernel = cuda.scan if backend == "cuda" else torch.ops.linzoo_cpu.diagonal_scan_forward
    kernel(a.contiguous(), b.contiguous(), initial, reverse, h)
    return h


def _backward(backend, dh, a, initial, reverse, h):
    dh, a = dh.contiguous(), a.contiguous()
    if backend == "cuda":
        return [g.contiguous() for g in cuda.backward(dh, a, h, initial, reverse) if g is not None]
    constant = a.dim() == 2
    da = a.new_empty(h.shape[0], *a.shape) if constant else a.new_empty(a.shape)
    db, dinitial = torch.empty_like(h), None if initial is None else initial.new_empty(initial.shape)
    initial = None if initial is None else initial.contiguous()
    torch.ops.linzoo_cpu.diagonal_scan_backward(dh, a, h, initial, reverse, da, db, dinitial)
    return [da.sum(0) if constant else da, db] + ([] if dinitial is None else [dinitial])


def _flops(b=(), h=(), **_):
    """4 per state and step: a complex product."""
    return 2 * torch.Size(b or h).numel()


_operator = Operator(
    "diagonal_scan",
    "(Tensor a, Tensor b, Tensor? initial, bool reverse) -> Tensor h",
    kernel="diagonal_scan",
    reference=reference.diagonal_scan,
    export=reference.looped,
    forward=_forward,
    backward=_backward,
    fake=lambda a, b, initial, reverse: b.new_empty(b.shape),
    flops=_flops,
    keep_first=True,
    drop={"b": reference.inputs_of},
)
