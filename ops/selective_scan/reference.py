"""The selective scan in plain PyTorch: the specification, step by step. Autograd gives its gradients."""

import math

import torch
import torch.nn.functional as F

from ..tensors import state_dtype
from ..walk import walk


def tokens_in_order(x, order):
    """``(B, L, G, K)`` to ``(B, T, G, K)``: step t of group g is token ``order[g, t]``."""
    if order is None:
        return x
    rows = _rows(order, x.shape)
    return x.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def tokens_in_place(y, order, length):
    """Inverse of `tokens_in_order`; tokens that no step visits are 0."""
    if order is None:
        return y
    shape = (y.shape[0], length, *y.shape[2:])
    rows = _rows(order, shape)
    return y.new_zeros(shape).flatten(0, 2).index_put((rows.flatten(),), y.flatten(0, 2)).view(shape)


def _rows(order, shape):
    """Rows ``(B, T, G)`` of the flattened ``(B, L, G)`` that the steps of the groups visit."""
    batch, length, groups = shape[:3]
    order = order.long().expand(batch, groups, order.shape[-1]).transpose(1, 2)
    first = torch.arange(batch, device=order.device).view(-1, 1, 1) * length
    return (first + order) * groups + torch.arange(groups, device=order.device)


def _steps(dt, dt_weight, dt_bias, dt_softplus, softplus=F.softplus):
    x = dt if dt_weight is None else torch.einsum("blgr,gdr->blgd", dt, dt_weight)
    x = x if dt_bias is None else x + dt_bias
    return softplus(x) if dt_softplus else x


def _softplus(x):
    """softplus for ONNX, which has no log1p: ONNX Runtime's own takes several times as long and is less exact."""
    small = torch.exp(-x.abs())
    one = 1 + small
    return x.clamp(min=0) + torch.where(one == 1, small, torch.log(one) * small / (one - 1))


def _step(h, delta, u, A, B, C):
    """``h = exp(delta A) h + delta u B`` and ``y = C h``, for one token of every group: h is ``(B, G, D, N)``."""
    h = torch.exp(delta.unsqueeze(-1) * A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    return h, (h * C.unsqueeze(2)).sum(-1)


def selective_scan(
    u,
    dt,
    A,
    B,
    C,
    D=None,
    dt_weight=None,
    dt_bias=None,
    dt_softplus=True,
    order=None,
    merge=False,
    use_scan=False,
):
    """See `linzoo.ops.selective_scan`. With `use_scan` the loop is one `torch._higher_order_ops.scan`.

    Returns:
        The output, and a list of the states ``(B, G, D, N)`` before each step (empty with `use_scan`).
    """
    dtype, length = state_dtype(u.dtype), u.shape[1]
    u_, dt, B, C = (tokens_in_order(x, order).to(dtype) for x in (u.expand(-1, -1, *A.shape[:2]), dt, B, C))
    delta = _steps(dt, dt_weight, dt_bias, dt_softplus, _softplus if use_scan else F.softplus)
    h, states = u_.new_zeros(u_.shape[0], *A.shape), []
    if use_scan:

        def step(h, x):
            delta, u, B, C = x
            h, y = _step(h, delta, u, A, B, C)
            return h, (y,)

        [y] = walk(step, h, (delta, u_, B, C), use_scan)
    else:
        steps = []
        for delta_t, u_t, B_t, C_t in zip(*(x.unbind(1) for x in (delta, u_, B, C)), strict=True):
            states.append(h)
            h, y = _step(h, delta_t, u_t, A, B_t, C_t)
            steps.append(y)
        y = torch.stack(steps, 1)
    if D is not None:
        y = y + D * u_
    y = tokens_in_place(y, order, length)
    return (y.sum(2) if merge else y).to(u.dtype), states


def chunked(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order, merge):
    """As `selective_scan` for one state and a fixed length T, in about 2 sqrt(T) steps: all chunks are walked together.

    Each chunk starts from zero. Then the chunks' last states are joined, and each step adds the state before its chunk
    times the product of its decays since, which lies in [0, 1].
    """
    dtype, length = state_dtype(u.dtype), u.shape[1]
    u_, dt, B, C = (tokens_in_order(x, order).to(dtype) for x in (u.expand(-1, -1, *A.shape[:2]), dt, B, C))
    delta = _steps(dt, dt_weight, dt_bias, dt_softplus, _softplus)
    steps = u_.shape[1]
    size = math.isqrt(steps - 1) + 1

    def chunks(x):  # (B, steps, chunks, G, D); padding steps come last
        return F.pad(x, (0, 0, 0, 0, 0, -steps % size)).unflatten(1, (-1, size)).transpose(1, 2)

    def step(state, x):
        (h, since), (keep, write) = state, x
        state = keep * h + write, since * keep
        return state, state

    def join(h, chunk):
        keep, write = chunk
        return keep * h + write, (h,)

    decay, write = (chunks(x) for x in (torch.exp(delta * A[..., 0]), delta * u_ * B))
    zero = decay.new_zeros(decay[:, 0].shape)
    h, since = walk(step, (zero, zero + 1), (decay, write), use_scan=True)
    [before] = walk(join, zero[:, 0].clone(), (since[:, -1], h[:, -1]), use_scan=True)
    h = (h + since * before.unsqueeze(1)).transpose(1, 2)
    y = h.flatten(1, 2)[:, :steps] * C
    if D is not None:
        y = y + D * u_
    y = tokens_in_place(y, order, length)
    return (y.sum(2) if merge else y).to(u.dtype)
