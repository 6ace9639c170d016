"""The selective scan in plain PyTorch: the specification, step by step, and its form for export."""

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan


def state_dtype(dtype):
    """dtype of the states and sums for activations of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tokens_in_order(x, order):
    """``(B, L, G, K)`` to ``(B, T, G, K)``: step t of group g is token ``order[g, t]``."""
    if order is None:
        return x
    index = order.long().expand(x.shape[0], *order.shape[-2:]).transpose(1, 2)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _tokens_in_place(y, order, length):
    """Inverse of `_tokens_in_order`; tokens that no step visits are 0."""
    if order is None:
        return y
    index = order.long().expand(y.shape[0], *order.shape[-2:]).transpose(1, 2)
    out = y.new_zeros(y.shape[0], length, *y.shape[2:])
    return out.scatter(1, index.unsqueeze(-1).expand_as(y), y)


def _recurrence(A):
    def step(h, inputs):
        delta, u, B, C = inputs
        h = torch.exp(delta.unsqueeze(-1) * A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(2)
        return h, (h * C.unsqueeze(2)).sum(-1)

    return step


def selective_scan(
    u, dt, A, B, C, D=None, dt_weight=None, dt_bias=None, dt_softplus=True, order=None, merge=False, use_scan=False
):
    """See `linzoo.ops.selective_scan`. With `use_scan` the loop is one `torch._higher_order_ops.scan`.

    Returns:
        The output, and a list of the state ``(B, G, D, N)`` before each step (empty with `use_scan`).
    """
    dtype, length = state_dtype(u.dtype), u.shape[1]
    u_, dt, B, C = (_tokens_in_order(x, order).to(dtype) for x in (u, dt, B, C))
    A = A.to(dtype)
    if dt_weight is not None:
        dt = torch.einsum("blgr,gdr->blgd", dt, dt_weight.to(dtype))
    delta = dt if dt_bias is None else dt + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)

    step, states = _recurrence(A), []
    h = u_.new_zeros(u_.shape[0], *A.shape)
    if use_scan:
        _, y = scan(step, h, tuple(x.transpose(0, 1) for x in (delta, u_, B, C)), dim=0)
        y = y.transpose(0, 1)
    else:
        steps = []
        for inputs in zip(*(x.unbind(1) for x in (delta, u_, B, C)), strict=True):
            states.append(h)
            h, y = step(h, inputs)
            steps.append(y)
        y = torch.stack(steps, 1)
    if D is not None:
        y = y + D.to(dtype) * u_
    y = _tokens_in_place(y, order, length)
    return (y.sum(2) if merge else y).to(u.dtype), states
