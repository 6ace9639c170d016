"""Selective scan (S6): the input-dependent diagonal state-space recurrence of Mamba, over any scan order."""

import os

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backend import forced_backend, resolve
from . import cuda
from .reference import selective_scan as reference
from .reference import selective_scan_backward as reference_backward
from .reference import state_dtype

__all__ = ["selective_scan", "selective_states"]

CHUNK = {"cpu": 32, "cuda": 16}  # steps between two stored states; also kChunk in cpu.cpp and cuda.cu
LANES = 16  # the CPU kernel walks this many channels at once
PARALLEL_TASKS = 16  # the CPU kernel splits the channels until it has about so many tasks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def selective_scan(
    u,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    dt_weight=None,
    dt_bias=None,
    dt_softplus=True,
    order=None,
    merge=False,
):
    """Selective scan of `u` along one scan order per group (Mamba, arXiv 2312.00752, eq. 2-4 and algorithm 2).

    For each batch item b, group g, channel d and step t, with token l = ``order[g, t]``::

        delta_t = softplus(dt_weight[g, d] . dt[b, l, g] + dt_bias[g, d])
        h_t     = exp(delta_t A[g, d]) h_{t-1} + delta_t B[b, l, g] u[b, l, g, d],     h_0 = 0, in R^N
        y[b, l, g, d] = C[b, l, g] . h_t + D[g, d] u[b, l, g, d]

    Nothing is copied into scan order: `u`, `dt`, `B` and `C` stay in token order and may be views (a stride-0 expand
    over G, a split of channels, a strided grid of tokens) as long as their last dimension is contiguous.

    Args:
        u: Input ``(B, L, G, D)``: L tokens, G scan groups of D channels. float64, float32, bfloat16 or float16.
        dt: Step sizes before bias and softplus ``(B, L, G, D)``, or ``(B, L, G, R)`` with `dt_weight`.
        A: Decay rates ``(G, D, N)``, negative.
        B: Input projections ``(B, L, G, N)``.
        C: Output projections ``(B, L, G, N)``.
        D: Skip weights ``(G, D)``; None for no skip.
        dt_weight: ``(G, D, R)`` expands a low-rank `dt` inside the kernel.
        dt_bias: ``(G, D)``.
        dt_softplus: Whether the step size passes through softplus.
        order: Integer ``(G, T)`` or ``(B, G, T)`` with T <= L distinct tokens per group; None for 0 .. L-1. Output at
            tokens that no step visits is 0.
        merge: Sum the groups' outputs.

    Returns:
        ``(B, L, G, D)``, or ``(B, L, D)`` with `merge`, in the dtype of the activations: `u`, `dt`, `B` and `C` are
        promoted to their widest dtype, so mixed inputs under autocast are fine. States and sums are float32, float64
        for float64 activations; `A`, `D`, `dt_weight` and `dt_bias` are read in that precision.

    Raises:
        ValueError: a shape does not fit, L or T is 0.
        TypeError: a dtype is not supported.
        RuntimeError: tensors on different devices; a forced backend cannot serve; `order` out of range (CPU).
            With ``LINZOO_DEBUG=1`` orders are also checked for repeated tokens, on every device.
    """
    order_shape = None if order is None else tuple(order.shape)
    _check_shapes(u, dt, A, B, C, D, dt_weight, dt_bias, order_shape)
    _check_types(u, dt, A, B, C, D, dt_weight, dt_bias, order)
    dtype = u.dtype
    for x in (dt, B, C):
        dtype = torch.promote_types(dtype, x.dtype)
    u, dt, B, C = (x.to(dtype) for x in (u, dt, B, C))
    A, D, dt_weight, dt_bias = (None if x is None else x.to(state_dtype(dtype)) for x in (A, D, dt_weight, dt_bias))
    if forced_backend() == "export":
        return reference(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, use_scan=True)[0]
    inputs = (u, dt, A, B, C, D, dt_weight, dt_bias)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    save = save and not torch.compiler.is_exporting()  # the number of chunks would tie the program to a length
    return torch.ops.linzoo.selective_scan(*inputs, dt_softplus, order, merge, save)[0]


def selective_states(u, dt, A, B, *, dt_weight=None, dt_bias=None, dt_softplus=True, order=None):
    """The states of a selective scan with one state per channel, ``h`` of `selective_scan` for N = 1.

    Spatial-Mamba (arXiv 2410.15091) fuses these states over space before it projects them to the output.

    Args: as `selective_scan`, with `A` ``(G, D, 1)`` and `B` ``(B, L, G, 1)``.

    Returns:
        ``(B, L, G, D)``: the state after each token's step.

    Raises:
        ValueError: N is not 1, or as `selective_scan`.
    """
    if A.shape[-1] != 1:
        raise ValueError(f"A: selective_states holds one state per channel (G, D, 1), got {tuple(A.shape)}")
    C = torch.ones_like(B)
    return selective_scan(u, dt, A, B, C, dt_weight=dt_weight, dt_bias=dt_bias, dt_softplus=dt_softplus, order=order)


def _check_shapes(u, dt, A, B, C, D, dt_weight, dt_bias, order):
    if u.dim() != 4:
        raise ValueError(f"u: expected (B, L, G, D), got {tuple(u.shape)}")
    if A.dim() != 3:
        raise ValueError(f"A: expected (G, D, N), got {tuple(A.shape)}")
    if dt_weight is not None and dt_weight.dim() != 3:
        raise ValueError(f"dt_weight: expected (G, D, R), got {tuple(dt_weight.shape)}")
    batch, length, groups, channels = u.shape
    states = A.shape[2]
    if length == 0 or channels == 0 or groups == 0 or states == 0:
        raise ValueError(f"u, A: every size but the batch must be positive, got {tuple(u.shape)} and {tuple(A.shape)}")
    rank = channels if dt_weight is None else dt_weight.shape[2]
    expected = {
        "dt": (dt, (batch, length, groups, rank), f"(B, L, G, {'D' if dt_weight is None else 'R'})"),
        "A": (A, (groups, channels, states), "(G, D, N)"),
        "B": (B, (batch, length, groups, states), "(B, L, G, N)"),
        "C": (C, (batch, length, groups, states), "(B, L, G, N)"),
        "D": (D, (groups, channels), "(G, D)"),
        "dt_weight": (dt_weight, (groups, channels, rank), "(G, D, R)"),
        "dt_bias": (dt_bias, (groups, channels), "(G, D)"),
    }
    for name, (tensor, shape, letters) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected {letters} = {shape} beside u {tuple(u.shape)}, got {tuple(tensor.shape)}"
            )
    if order is None:
        return
    fits = len(order) in (2, 3) and order[-2] == groups and 0 < order[-1] <= length
    if not fits or (len(order) == 3 and order[0] != batch):
        raise ValueError(
            f"order: expected (G, T) or (B, G, T) with B = {batch}, G = {groups}, 0 < T <= L = {length}, got {order}"
        )


def _check_types(u, dt, A, B, C, D, dt_weight, dt_bias, order):
    named = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, dt_weight=dt_weight, dt_bias=dt_bias)
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != u.device:
            raise RuntimeError(f"{name}: expected on {u.device} as u, got {tensor.device}")
    if order is not None:
        if order.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"order: expected int32 or int64, got {order.dtype}")
        if order.device != u.device:
            raise RuntimeError(f"order: expected on {u.device} as u, got {order.device}")


def _check_order(order, length):
    if order is None or os.environ.get("LINZOO_DEBUG") != "1":
        return
    if order.min() < 0 or order.max() >= length:
        raise RuntimeError(f"order: every entry must lie in [0, {length}), got {order.min()} to {order.max()}")
    ordered = order.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise RuntimeError("order: a group visits a token twice")


# Registration. The operator returns its output and, if `save`, the state before each chunk of CHUNK steps, from which
# the backward pass recomputes the others; without them it runs the forward pass again.

_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? order"
)
torch.library.define("linzoo::selective_scan", f"({_INPUTS}, bool merge, bool save) -> (Tensor y, Tensor states)")
torch.library.define("linzoo::selective_scan_backward", f"(Tensor dy, {_INPUTS}, Tensor states) -> Tensor[]")


def _states_shape(u, A, order, save):
    steps = u.shape[1] if order is None else order.shape[-1]
    chunk = CHUNK.get(u.device.type, 1)
    return (u.shape[0], u.shape[2], (steps + chunk - 1) // chunk, A.shape[2], u.shape[3]) if save else (0,)


def _empty_outputs(u, A, order, merge, save):
    y = u.new_empty((*u.shape[:2], u.shape[3]) if merge else u.shape)
    return y, u.new_empty(_states_shape(u, A, order, save), dtype=state_dtype(u.dtype))


def _split_channels(u, tasks):
    """Channels per task of the CPU kernel: from the problem's shape alone, so that results do not depend on threads."""
    blocks = -(-u.shape[3] // LANES)
    splits = min(max(PARALLEL_TASKS // max(tasks, 1), 1), blocks)
    return -(-blocks // splits) * LANES


def _kernel_inputs(u, dt, A, B, C, D, dt_weight, dt_bias, order):
    """Arguments as the kernels want them: contiguous channels; A in units of log2(e), since they compute 2^x."""
    u, dt, B, C = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, dt, B, C))
    A = A.transpose(1, 2).contiguous() * 1.4426950408889634
    dt_weight = None if dt_weight is None else dt_weight.transpose(1, 2).contiguous()
    D, dt_bias = (None if x is None else x.contiguous() for x in (D, dt_bias))
    order = None if order is None else order.to(torch.int32).contiguous()
    return u, dt, A, B, C, D, dt_weight, dt_bias, order


def _forward(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, save):
    _check_order(order, u.shape[1])
    backend = resolve("selective_scan", u.device)
    if backend == "reference":
        y, states = reference(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge)
        states = (
            torch.stack(states[:: CHUNK.get(u.device.type, 1)], 2).transpose(3, 4)
            if save
            else u.new_empty(0, dtype=A.dtype)
        )
        return y.contiguous(), states.contiguous()
    y, states = _empty_outputs(u, A, order, merge, save)
    *inputs, order = _kernel_inputs(u, dt, A, B, C, D, dt_weight, dt_bias, order)
    if order is not None and order.shape[-1] < u.shape[1] and not merge:
        y.zero_()
    if backend == "cuda":
        cuda.forward(*inputs, dt_softplus, order, merge, y, states)
        return y, states
    split = _split_channels(u, u.shape[0] * (1 if merge else u.shape[2]))
    torch.ops.linzoo_cpu.selective_scan_forward(*inputs, dt_softplus, order, merge, split, y, states)
    return y, states


@torch.library.register_fake("linzoo::selective_scan")
def _forward_fake(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, save):
    return _empty_outputs(u, A, order, merge, save)


def _backward(dy, u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, states):
    tensors = (u, dt, A, B, C, D, dt_weight, dt_bias)
    backend = resolve("selective_scan", u.device)
    if backend == "reference":
        grads = reference_backward(dy, *tensors, dt_softplus, order)
        return [g.contiguous() for g in grads if g is not None]
    if states.dim() == 1:
        states = _forward(*tensors, dt_softplus, order, False, True)[1]
    batch, length, groups, channels = u.shape
    new = torch.empty if order is None or order.shape[-1] == length else torch.zeros  # 0 where no step visits a token
    if backend == "cuda":
        splits, _, segments, _ = cuda.plan(u, length if order is None else order.shape[-1])
        parts = batch * segments  # sums over steps
    else:
        split, parts = _split_channels(u, batch * groups), batch
        splits = -(-channels // split)
    sums = dict(dtype=A.dtype, device=u.device)
    du = new(u.shape, dtype=u.dtype, device=u.device)
    dB, dC = (new(splits, batch, length, groups, A.shape[2], **sums) for _ in range(2))
    dA = torch.empty(parts, groups, A.shape[2], channels, **sums)
    dD, dbias = (torch.empty(parts, groups, channels, **sums) for _ in range(2))
    if dt_weight is None:
        ddt, dweight = new(u.shape, dtype=u.dtype, device=u.device), torch.empty(0, **sums)
    else:
        rank = dt_weight.shape[2]
        ddt = new(splits, batch, length, groups, rank, **sums)
        dweight = torch.empty(parts, groups, rank, channels, **sums)
    *inputs, order = _kernel_inputs(u, dt, A, B, C, D, dt_weight, dt_bias, order)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    outputs = du, ddt, dA, dB, dC, dD, dweight, dbias
    if backend == "cuda":
        cuda.backward(dy, *inputs, dt_softplus, order, states, *outputs)
    else:
        torch.ops.linzoo_cpu.selective_scan_backward(dy, *inputs, dt_softplus, order, split, states, *outputs)
    grads = [du, ddt if dt_weight is None else ddt.sum(0).to(dt.dtype), dA.sum(0).transpose(1, 2).contiguous()]
    grads += [x.sum(0).to(u.dtype) for x in (dB, dC)]
    if D is not None:
        grads.append(dD.sum(0))
    if dt_weight is not None:
        grads.append(dweight.sum(0).transpose(1, 2).contiguous())
    if dt_bias is not None:
        grads.append(dbias.sum(0))
    return grads


@torch.library.register_fake("linzoo::selective_scan_backward")
def _backward_fake(dy, u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, states):
    return [x.new_empty(x.shape) for x in (u, dt, A, B, C, D, dt_weight, dt_bias) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, order, ctx.merge, _ = inputs
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(*tensors, order, output[1])


def _autograd(ctx, dy, _):
    *tensors, order, states = ctx.saved_tensors
    if ctx.merge:  # every group's output receives the gradient of their sum
        dy = dy.contiguous().unsqueeze(2).expand(tensors[0].shape)
    grads = iter(torch.ops.linzoo.selective_scan_backward(dy, *tensors, ctx.dt_softplus, order, states))
    return *(next(grads) if present else None for present in ctx.present), None, None, None, None


torch.library.impl("linzoo::selective_scan", "default", _forward)
torch.library.impl("linzoo::selective_scan_backward", "default", _backward)
torch.library.register_autograd("linzoo::selective_scan", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.linzoo.selective_scan)
def _flops(u, dt, A, B, C, D, *args, out_shape=None, **kwargs):
    """Per token and channel: 9 N for the scan, 1 for the skip, R for the low-rank step, as the field's papers count."""
    dt_weight, order = args[0], args[3]
    batch, length, groups, channels = u
    steps = length if order is None else order[-1]
    rank = 0 if dt_weight is None else dt_weight[2]
    return batch * steps * groups * channels * (9 * A[2] + (D is not None) + rank)


@register_flop_formula(torch.ops.linzoo.selective_scan_backward)
def _flops_backward(dy, *inputs, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * _flops(*inputs)
