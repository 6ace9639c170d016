"""Selective scan (S6): the input-dependent diagonal state-space recurrence of Mamba, over any scan order."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import CHUNK, Operator
from ..tensors import check, dense_rows, promote, state_dtype
from . import cuda, reference

__all__ = ["selective_scan", "selective_scan_state", "selective_states"]

LANES = 16  # the CPU kernel walks this many channels at once
PARALLEL_TASKS = 16  # the CPU kernel splits the channels into about this many tasks
FEW_IMAGES = 4  # the CPU kernel's tasks for fewer take one group each


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    order: Tensor | None = None,
    merge: bool = False,
) -> Tensor:
    """Selective scan of `u` along one scan order per group (Mamba, arXiv 2312.00752, eq. 2-4 and algorithm 2).

    For each batch item b, group g, channel d and step t, with token l = ``order[g, t]``::

        delta_t = softplus(dt_weight[g, d] . dt[b, l, g] + dt_bias[g, d])
        h_t     = exp(delta_t A[g, d]) h_{t-1} + delta_t B[b, l, g] u[b, l, g, d],     h_0 = 0, in R^N
        y[b, l, g, d] = C[b, l, g] . h_t + D[g, d] u[b, l, g, d]

    Nothing is copied into scan order. `u`, `dt`, `B` and `C` stay in token order and may be views (a stride-0 expand
    over G, a split of channels, a strided grid of tokens) if their last dimension is contiguous.

    Args:
        u: Input ``(B, L, G, D)``: L tokens, G scan groups of D channels. float64, float32, bfloat16 or float16. Where
            all groups read the same, give ``(B, L, 1, D)``: its gradient then takes less memory than an expand's.
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
        promoted to their widest dtype, so mixed inputs under autocast are fine. States and sums are float32 (float64
        for float64 activations); `A`, `D`, `dt_weight` and `dt_bias` are read in that precision.

    Raises:
        ValueError: a shape does not fit, L or T is 0, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
        RuntimeError: a forced backend cannot run it; `order` is out of range (CPU). With ``LINZOO_DEBUG=1`` orders are
            also checked for repeated tokens, on every device.
    """
    _check(u, dt, A, B, C, D, dt_weight, dt_bias, order)
    dtype = promote(u, dt, B, C)
    u, dt, B, C = (x.to(dtype) for x in (u, dt, B, C))
    D, dt_weight, dt_bias = (None if x is None else x.to(state_dtype(dtype)) for x in (D, dt_weight, dt_bias))
    return _operator(u, dt, A.to(state_dtype(dtype)), B, C, D, dt_weight, dt_bias, dt_softplus, order, merge)


def _check(u, dt, A, B, C, D, dt_weight, dt_bias, order, initial=None):
    shared = isinstance(u, Tensor) and u.dim() == 4 and u.shape[2] == 1
    check(
        u=(u, "BL1D" if shared else "BLGD"),
        A=(A, "GDN"),
        B=(B, "BLGN"),
        C=(C, "BLGN"),
        D=(D, "GD"),
        initial=(initial, "BGDN"),
        dt_weight=(dt_weight, "GDR"),
        dt=(dt, "BLGD" if dt_weight is None else "BLGR"),
        dt_bias=(dt_bias, "GD"),
        order=(order, "GT"),
    )


def selective_scan_state(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` with an initial and a final state: cut a sequence, and continue each part from the last state.

    N extra steps in front write the given state, and N behind read the last one. Their step size is 2^-40, in which no
    state decays.

    Args:
        u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order: As in `selective_scan`.
        initial: h_0 of each group ``(B, G, D, N)``; None for 0. It has a gradient.

    Returns:
        y ``(B, L, G, D)`` in the widest dtype of the activations, and the state after the last step
        ``(B, G, D, N)`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: As in `selective_scan`.
    """
    _check(u, dt, A, B, C, D, dt_weight, dt_bias, order, initial)
    dtype, states = promote(u, dt, B, C), A.shape[2]
    u, dt, A, B, C = (x.to(state_dtype(dtype)) for x in (_of_groups(u, A), dt, A, B, C))
    if dt_weight is not None:
        dt = torch.einsum("blgr,gdr->blgd", dt, dt_weight.to(dt.dtype))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt

    length, front = u.shape[1], 0 if initial is None else states
    one_hot = torch.eye(states, dtype=u.dtype, device=u.device)[None, :, None].expand(u.shape[0], -1, u.shape[2], -1)

    def constant(x: Tensor, steps: int, value: float) -> Tensor:
        return x.new_full((x.shape[0], steps, *x.shape[2:]), value)

    written = constant(u, 0, 0) if initial is None else initial.to(u.dtype).movedim(3, 1)
    u = torch.cat([written, u, constant(u, states, 0)], 1)
    dt = torch.cat([constant(dt, front, INSTANT), dt, constant(dt, states, INSTANT)], 1)
    B = torch.cat([one_hot[:, :front] / INSTANT, B, constant(B, states, 0)], 1)
    C = torch.cat([constant(C, front, 0), C, one_hot], 1)
    if order is not None:
        at = torch.arange(u.shape[1], dtype=order.dtype, device=order.device).expand(*order.shape[:-1], -1)
        order = torch.cat([at[..., :front], order + front, at[..., front + length :]], -1)
    y = selective_scan(u, dt, A, B, C, D, dt_softplus=False, order=order)
    return y[:, front : front + length].to(dtype), y[:, front + length :].movedim(1, 3)


INSTANT = 2.0**-40  # a step size in which no state decays; times its inverse it is exactly 1


def selective_states(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    order: Tensor | None = None,
) -> Tensor:
    """The states of a selective scan with one state per channel: ``h`` of `selective_scan` for N = 1.

    Spatial-Mamba (arXiv 2410.15091) fuses these states over space before it projects them to the output.

    Args: as `selective_scan`, with `A` ``(G, D, 1)`` and `B` ``(B, L, G, 1)``.

    Returns:
        ``(B, L, G, D)``: the state after each token's step.

    Raises:
        ValueError: N is not 1, or as in `selective_scan`.
    """
    check(A=(A, "GD1"), B=(B, "BLG1"))
    C = torch.ones_like(B)
    return selective_scan(u, dt, A, B, C, dt_weight=dt_weight, dt_bias=dt_bias, dt_softplus=dt_softplus, order=order)


# The operator's second result holds the state before each chunk of CHUNK steps. The backward pass recomputes the others
# from them; if they were not saved, it runs the forward pass again.


def _chunk(u, A):
    chunk = CHUNK.get(u.device.type, 1)
    return cuda.chunk(u.shape[3], A.shape[2]) if chunk == CHUNK["cuda"] else chunk


def _reference(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, save, use_scan=False):
    y, states = reference.selective_scan(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, use_scan)
    kept = torch.stack(states[:: _chunk(u, A)], 2).transpose(3, 4) if save else A.new_empty(0)
    return y, kept


def _chunked(*inputs):
    """Faster than the loop for one state per channel; with more, products of decays take too much memory."""
    A = inputs[2]
    return (reference.chunked(*inputs[:-1]), A.new_empty(0)) if A.shape[2] == 1 else _reference(*inputs, use_scan=True)


def _of_groups(u, A):
    """`u` ``(B, L, G, D)``, as a view if it is ``(B, L, 1, D)``."""
    return u.expand(-1, -1, A.shape[0], -1)


def _empty(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, save):
    batch, length, groups, channels = _of_groups(u, A).shape
    chunk, steps = _chunk(u, A), length if order is None else order.shape[-1]
    states = (batch, groups, (steps + chunk - 1) // chunk, A.shape[2], channels) if save else (0,)
    y = u.new_empty((batch, length, channels) if merge else (batch, length, groups, channels))
    return y, u.new_empty(states, dtype=state_dtype(u.dtype))


def _split_channels(u, tasks):
    """Channels per task of the CPU kernel, from the problem's shape only, so that threads do not change results."""
    blocks = -(-u.shape[3] // LANES)
    splits = torch.sym_min(torch.sym_max(PARALLEL_TASKS // torch.sym_max(tasks, 1), 1), blocks)
    return -(-blocks // splits) * LANES


def _kernel_inputs(u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order):
    """Arguments as the kernels need them: contiguous channels; A in units of log2(e), since they compute 2^x."""
    return dict(
        u=_of_groups(dense_rows(u), A),
        dt=dense_rows(dt),
        A=A.transpose(1, 2).contiguous() * 1.4426950408889634,
        B=dense_rows(B),
        C=dense_rows(C),
        D=None if D is None else D.contiguous(),
        dt_weight=None if dt_weight is None else dt_weight.transpose(1, 2).contiguous(),
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        softplus=softplus,
        order=None if order is None else order.to(torch.int32).contiguous(),
    )


def _forward(backend, *inputs):
    u, *_, order, merge, _ = inputs
    y, states = _empty(*inputs)
    if order is not None and order.shape[-1] < u.shape[1] and not merge:
        y.zero_()
    named = _kernel_inputs(*inputs[:-2]) | dict(merge=merge, y=y, states=states)
    if backend == "cuda":
        cuda.forward(**named)
    else:
        split = _split_channels(u, u.shape[0] * (1 if merge else inputs[2].shape[0]))
        torch.ops.linzoo_cpu.selective_scan_forward(**named, split_channels=split)
    return y, states


def _backward(backend, dy, u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge, states):
    inputs = u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order
    if states.dim() == 1:
        states = _forward(backend, *inputs, False, True)[1]
    batch, length, groups, channels = shape = _of_groups(u, A).shape
    if merge:  # every group's output receives the gradient of their sum
        dy = dy.contiguous().unsqueeze(2).expand(shape)
    new = torch.empty if order is None or order.shape[-1] == length else torch.zeros  # 0 where no step visits a token
    named = _kernel_inputs(*inputs) | dict(dy=dense_rows(dy), states=states)
    # Where groups share u, a kernel may add up its gradient: on the CPU if there are tasks enough without groups, on
    # CUDA in an order that changes.
    shared = u.shape[2] < groups
    merged = shared and (batch >= FEW_IMAGES if backend == "cpu" else not torch.are_deterministic_algorithms_enabled())
    if backend == "cuda":
        of_plan = ("u", "dt", "A", "order", "dt_weight", "D", "dt_bias", "dy")
        p = cuda.plan(*(named[name] for name in of_plan))
        splits, parts, split = p.blocks, batch * p.segments, dict(p=p)  # sums over steps
    else:
        split = dict(split_channels=_split_channels(u, batch * (1 if merged else groups)))
        splits, parts = -(-channels // split["split_channels"]), batch
    sums = dict(dtype=A.dtype, device=u.device)
    if merged:
        du = (torch.zeros if backend == "cuda" else new)(u.shape, **sums)
    else:
        du = new(shape, dtype=u.dtype, device=u.device)
    dB, dC = (new(splits, batch, length, groups, A.shape[2], **sums) for _ in range(2))
    dA = torch.empty(parts, groups, A.shape[2], channels, **sums)
    dD, dbias = (torch.empty(parts, groups, channels, **sums) for _ in range(2))
    if dt_weight is None:
        ddt, dweight = new(shape, dtype=u.dtype, device=u.device), torch.empty(0, **sums)
    else:
        rank = dt_weight.shape[2]
        ddt = new(splits, batch, length, groups, rank, **sums)
        dweight = torch.empty(parts, groups, rank, channels, **sums)
    outputs = dict(du=du, ddt=ddt, dA=dA, dB=dB, dC=dC, dD=dD, ddt_weight=dweight, ddt_bias=dbias)
    kernel = cuda.backward if backend == "cuda" else torch.ops.linzoo_cpu.selective_scan_backward
    kernel(**named, **split, **outputs)
    du = du.sum(2, keepdim=True) if shared and not merged else du.to(u.dtype)
    grads = [du, ddt if dt_weight is None else ddt.sum(0).to(dt.dtype), dA.sum(0).transpose(1, 2).contiguous()]
    grads += [x.sum(0).to(u.dtype) for x in (dB, dC)]
    if D is not None:
        grads.append(dD.sum(0))
    if dt_weight is not None:
        grads.append(dweight.sum(0).transpose(1, 2).contiguous())
    if dt_bias is not None:
        grads.append(dbias.sum(0))
    return grads


def _flops(u, A, D, dt_weight, order, **_):
    """Per token and channel: 9 N for the scan, 1 for the skip, R for the low-rank step, as papers count."""
    batch, length, _, channels = u
    steps = length if order is None else order[-1]
    rank = 0 if dt_weight is None else dt_weight[2]
    return batch * steps * A[0] * channels * (9 * A[2] + (D is not None) + rank)


_operator = Operator(
    "selective_scan",
    "(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? order, bool merge, bool save) -> (Tensor y, Tensor states)",
    kernel="selective_scan",
    reference=_reference,
    export=functools.partial(_reference, use_scan=True),
    chunked=_chunked,
    forward=_forward,
    backward=_backward,
    fake=_empty,
    flops=_flops,
    limit=lambda backend, *x: cuda.limit(x[0], x[2], x[6]) if backend == "cuda" else None,
)
