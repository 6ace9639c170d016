"""The selective scan in plain PyTorch: the specification, step by step. Autograd gives its gradients."""

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan

from ..tensors import state_dtype


def tokens_in_order(x, order):
    """``(B, L, G, K)`` to ``(B, T, G, K)``: step t of group g is token ``order[g, t]``."""
    if order is None:
        return x
    index = order.long().expand(x.shape[0], *order.shape[-2:]).transpose(1, 2)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def tokens_in_place(y, order, length):
    """Inverse of `tokens_in_order`; tokens that no step visits are 0."""
    if order is None:
        return y
    index = order.long().expand(y.shape[0], *order.shape[-2:]).transpose(1, 2)
    out = y.new_zeros(y.shape[0], length, *y.shape[2:])
    return out.scatter(1, index.unsqueeze(-1).expand_as(y), y)


def _steps(dt, dt_weight, dt_bias, dt_softplus):
    x = dt if dt_weight is None else torch.einsum("blgr,gdr->blgd", dt, dt_weight)
    x = x if dt_bias is None else x + dt_bias
    return F.softplus(x) if dt_softplus else x


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
    u_, dt, B, C = (tokens_in_order(x, order).to(dtype) for x in (u, dt, B, C))
    delta = _steps(dt, dt_weight, dt_bias, dt_softplus)
    h, states = u_.new_zeros(u_.shape[0], *A.shape), []
    if use_scan:
        xs = tuple(x.transpose(0, 1) for x in (delta, u_, B, C))
        _, y = scan(lambda h, x: _step(h, x[0], x[1], A, x[2], x[3]), h, xs, dim=0)
        y = y.transpose(0, 1)
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
