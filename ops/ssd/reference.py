"""State-space duality, step by step in plain PyTorch: the specification."""

import torch

from ..tensors import state_dtype


def ssd(x, dt, A, B, C, D=None):
    """See `linzoo.ops.ssd`."""
    return ssd_state(x, dt, A, B, C, D)[0]


def ssd_state(x, dt, A, B, C, D=None, initial=None):
    """See `linzoo.ops.ssd_state`."""
    heads_per_group = x.shape[2] // B.shape[2]
    dtype = state_dtype(x.dtype)
    x_, dt, A = (t.to(dtype) for t in (x, dt, A))
    B, C = (t.to(dtype).repeat_interleave(heads_per_group, 2) for t in (B, C))
    h, outputs = x_.new_zeros(*x.shape[:1], x.shape[2], B.shape[3], x.shape[3]), []  # (B, H, N, P)
    h = h if initial is None else initial.to(dtype).mT
    for t in range(x.shape[1]):
        decay, step = torch.exp(dt[:, t] * A)[..., None, None], dt[:, t, :, None, None]
        h = decay * h + step * B[:, t].unsqueeze(-1) * x_[:, t].unsqueeze(-2)
        outputs.append((C[:, t].unsqueeze(-1) * h).sum(-2))
    y = torch.stack(outputs, 1)
    return (y if D is None else y + D.to(dtype)[:, None] * x_).to(x.dtype), h.mT


def nc_ssd(x, weight, B, C, D=None):
    """See `linzoo.ops.nc_ssd`."""
    dtype = state_dtype(x.dtype)
    x_, weight, B, C = (t.to(dtype) for t in (x, weight, B, C))
    state = x_.new_zeros(x.shape[0], x.shape[2], B.shape[2], x.shape[3])
    for t in range(x.shape[1]):
        state = state + weight[:, t, :, None, None] * B[:, t, None, :, None] * x_[:, t].unsqueeze(-2)
    y = (C[:, :, None, :, None] * state.unsqueeze(1)).sum(-2)
    return (y if D is None else y + D.to(dtype)[:, None] * x_).to(x.dtype)
