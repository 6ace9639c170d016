"""The selective scan in plain PyTorch: the specification, step by step, and its form for export."""

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan


def state_dtype(dtype):
    """dtype of the states and sums for activations of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """delta, and its value before softplus."""
    x = dt if dt_weight is None else torch.einsum("blgr,gdr->blgd", dt, dt_weight)
    x = x if dt_bias is None else x + dt_bias
    return (F.softplus(x) if dt_softplus else x), x


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
    delta, _ = _steps(dt, dt_weight, dt_bias, dt_softplus)
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


def selective_scan_backward(dy, u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order):
    """Gradients of `selective_scan` (without merge), by the adjoint recurrence ``dh_{t-1} = exp(delta_t A) dh_t``.

    Returns:
        The gradients of u, dt, A, B, C, D, dt_weight and dt_bias, None for those that are None.
    """
    inputs = (u, dt, A, B, C, D, dt_weight, dt_bias)
    dtype, length = state_dtype(u.dtype), u.shape[1]
    states = selective_scan(u, dt, A, B, C, D, dt_weight, dt_bias, dt_softplus, order)[1]
    dy, u, dt, B, C = (tokens_in_order(x, order).to(dtype) for x in (dy, u, dt, B, C))
    delta, x = _steps(dt, dt_weight, dt_bias, dt_softplus)
    dA, dh = torch.zeros_like(A), torch.zeros_like(states[0])
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
    for t in reversed(range(u.shape[1])):
        delta_t, u_t, dy_t = delta[:, t].unsqueeze(-1), u[:, t].unsqueeze(-1), dy[:, t].unsqueeze(-1)  # (B, G, D, 1)
        decay, B_t = torch.exp(delta_t * A), B[:, t].unsqueeze(2)
        h_t = decay * states[t] + delta_t * u_t * B_t
        dC[:, t] = (dy_t * h_t).sum(2)
        dh = dh + dy_t * C[:, t].unsqueeze(2)
        dB[:, t] = (dh * delta_t * u_t).sum(2)
        dinput = (dh * B_t).sum(-1)
        dh = decay * dh
        through_decay = dh * states[t]
        ddelta[:, t] = (through_decay * A).sum(-1) + dinput * u[:, t]
        dA += (through_decay * delta_t).sum(0)
        du[:, t] = dinput * delta[:, t]
    if D is not None:
        du += D * dy
    dx = ddelta * torch.sigmoid(x) if dt_softplus else ddelta
    ddt = dx if dt_weight is None else torch.einsum("blgd,gdr->blgr", dx, dt_weight)
    du, ddt, dB, dC = (tokens_in_place(g, order, length) for g in (du, ddt, dB, dC))
    dD = (dy * u).sum((0, 1))
    dweight = None if dt_weight is None else torch.einsum("blgd,blgr->gdr", dx, dt)
    grads = (du, ddt, dA, dB, dC, dD, dweight, dx.sum((0, 1)))
    return [None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
