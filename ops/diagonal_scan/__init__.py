"""Complex diagonal recurrence: the scan of S5 and ConvS5."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backend import forced_backend, resolve
from ..selective_scan.reference import state_dtype
from . import cuda
from .reference import diagonal_scan as reference
from .reference import diagonal_scan_backward as reference_backward

__all__ = ["diagonal_scan"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def diagonal_scan(a, b, initial=None, *, reverse=False):
    """``h_t = a_t h_{t-1} + b_t``, elementwise over complex states (S5, arXiv 2208.04933, section 2.2).

    Complex tensors hold (re, im) on their last axis: projections into and out of the states are then real matrix
    products, also in half precision.

    Args:
        a: Gains ``(..., P, 2)``: of the shape of `b` (a gain per step), or of that without batch and time, or of its
            last dimensions, which the others then share. float64, float32, bfloat16 or float16.
        b: Inputs ``(B, L, ..., P, 2)``: L steps along the second axis.
        initial: The state in front of the first step ``(B, ..., P, 2)``; None for 0.
        reverse: From the last step to the first: ``h_t = a_t h_{t+1} + b_t``.

    Returns:
        The states ``(B, L, ..., P, 2)`` in the dtype of `b`; `a`, `initial` and the running state are float32 (float64
        for float64).

    Raises:
        ValueError: a shape does not fit, or L is 0.
        TypeError: a dtype is not supported.
        RuntimeError: tensors on different devices; a forced backend cannot serve.
    """
    if b.dim() < 4 or b.shape[-1] != 2 or b.shape[1] == 0:
        raise ValueError(f"b: expected (B, L, ..., P, 2) with L > 0, got {tuple(b.shape)}")
    inner = tuple(b.shape[2:])
    shared = a.dim() >= 2 and a.dim() < b.dim() and tuple(a.shape) == inner[len(inner) - a.dim() :]
    if not shared and a.shape != b.shape:
        raise ValueError(f"a: expected {tuple(b.shape)} or its last dimensions, got {tuple(a.shape)}")
    if initial is not None and tuple(initial.shape) != (b.shape[0], *inner):
        raise ValueError(f"initial: expected (B, ..., P, 2) = {(b.shape[0], *inner)}, got {tuple(initial.shape)}")
    for name, tensor in (("a", a), ("b", b), ("initial", initial)):
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != b.device:
            raise RuntimeError(f"{name}: expected on {b.device} as b, got {tensor.device}")
    dtype = state_dtype(b.dtype)
    a = (a.expand(inner) if shared else a).to(dtype)
    a = a.flatten(0, -2) if shared else a.flatten(2, -2)
    initial = None if initial is None else initial.to(dtype).flatten(1, -2)
    inputs = (a, b.flatten(2, -2), initial, reverse)
    h = reference(*inputs) if forced_backend() == "export" else torch.ops.linzoo.diagonal_scan(*inputs)
    return h.view(b.shape)


# Registration. The states between batch, time and (re, im) are one axis M here; the backward pass reads the output.

torch.library.define("linzoo::diagonal_scan", "(Tensor a, Tensor b, Tensor? initial, bool reverse) -> Tensor")
torch.library.define(
    "linzoo::diagonal_scan_backward", "(Tensor dh, Tensor a, Tensor h, Tensor? initial, bool reverse) -> Tensor[]"
)


def _forward(a, b, initial, reverse):
    backend = resolve("diagonal_scan", b.device)
    if backend == "reference":
        return reference(a, b, initial, reverse).contiguous()
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    initial = None if initial is None else initial.contiguous()
    kernel = cuda.scan if backend == "cuda" else torch.ops.linzoo_cpu.diagonal_scan_forward
    kernel(a.contiguous(), b.contiguous(), initial, reverse, h)
    return h


@torch.library.register_fake("linzoo::diagonal_scan")
def _forward_fake(a, b, initial, reverse):
    return b.new_empty(b.shape)


def _backward(dh, a, h, initial, reverse):
    backend = resolve("diagonal_scan", h.device)
    if backend != "cpu":
        grads = (cuda.backward if backend == "cuda" else reference_backward)(
            dh.contiguous(), a.contiguous(), h, initial, reverse
        )
        return [g.contiguous() for g in grads if g is not None]
    constant = a.dim() == 2
    da = a.new_empty(h.shape[0], *a.shape) if constant else a.new_empty(a.shape)
    db, dinitial = torch.empty_like(h), None if initial is None else initial.new_empty(initial.shape)
    initial = None if initial is None else initial.contiguous()
    torch.ops.linzoo_cpu.diagonal_scan_backward(dh.contiguous(), a.contiguous(), h, initial, reverse, da, db, dinitial)
    return [da.sum(0) if constant else da, db] + ([] if dinitial is None else [dinitial])


@torch.library.register_fake("linzoo::diagonal_scan_backward")
def _backward_fake(dh, a, h, initial, reverse):
    return [x.new_empty(x.shape) for x in (a, h, initial) if x is not None]


def _setup_context(ctx, inputs, output):
    a, _, initial, ctx.reverse = inputs
    ctx.save_for_backward(a, output, initial)


def _autograd(ctx, dh):
    a, h, initial = ctx.saved_tensors
    da, db, *rest = torch.ops.linzoo.diagonal_scan_backward(dh, a, h, initial, ctx.reverse)
    return da, db, rest[0] if rest else None, None


torch.library.impl("linzoo::diagonal_scan", "default", _forward)
torch.library.impl("linzoo::diagonal_scan_backward", "default", _backward)
torch.library.register_autograd("linzoo::diagonal_scan", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.linzoo.diagonal_scan)
def _flops(a, b, *args, out_shape=None, **kwargs):
    """4 per state and step: a complex product."""
    return 2 * torch.Size(b).numel()


@register_flop_formula(torch.ops.linzoo.diagonal_scan_backward)
def _flops_backward(dh, a, h, *args, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 4 * torch.Size(h).numel()
