"""State-space duality in plain PyTorch: step by step, the specification, and chunk by chunk, as matrix products."""

import torch
import torch.nn.functional as F

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


def chunked(C, B, x, g, dt, initial, chunk_size):
    """Outputs, and the last state behind them, ``(batch, L + N, H, P)``.

    C, B ``(batch, L, G, N)``, x ``(batch, L, H, P)``, logarithms of the decays g and steps dt ``(batch, L, H)``,
    initial ``(batch, H, N, P)`` or None.
    """
    length, groups = B.shape[1:3]
    heads = x.shape[2] // groups
    pad = -length % chunk_size  # steps with dt 0, which leave the state as it is

    def chunks(t, heads):  # (batch, G, heads of a group, chunks, steps, ...)
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
        return t.unflatten(1, (-1, chunk_size)).unflatten(3, (groups, heads)).movedim((3, 4), (1, 2))

    u, log_decay, B, C = chunks(x * dt.unsqueeze(-1), heads), chunks(g, heads), chunks(B, 1), chunks(C, 1)

    # (..., l, s): the decay from step s to step l, summed separately for each pair. Differences of running sums would
    # lose the digits of A's gradient.
    since = log_decay.unsqueeze(-1).expand(*log_decay.shape, chunk_size).tril(-1).cumsum(-2).exp().tril()
    y = (C @ B.mT * since) @ u

    final = (B * since[..., -1, :].unsqueeze(-1)).mT @ u  # (batch, G, h, c, N, P)
    total = log_decay.cumsum(-1).exp().unsqueeze(-1)
    state, before = torch.zeros_like(final[:, :, :, 0]), []
    if initial is not None:
        state = initial.unflatten(1, (groups, heads))
    for decay, written in zip(total[..., -1:, :].unbind(3), final.unbind(3), strict=True):
        before.append(state)
        state = torch.addcmul(written, decay, state)
    y = torch.addcmul(y, total, C @ torch.stack(before, 3))
    y = y.movedim((1, 2), (3, 4)).flatten(3, 4).flatten(1, 2)[:, :length]
    return torch.cat([y, state.flatten(1, 2).transpose(1, 2)], 1)


def nc_ssd(x, weight, B, C, D=None):
    """See `linzoo.ops.nc_ssd`."""
    dtype = state_dtype(x.dtype)
    x_, weight, B, C = (t.to(dtype) for t in (x, weight, B, C))
    state = x_.new_zeros(x.shape[0], x.shape[2], B.shape[2], x.shape[3])
    for t in range(x.shape[1]):
        state = state + weight[:, t, :, None, None] * B[:, t, None, :, None] * x_[:, t].unsqueeze(-2)
    y = (C[:, :, None, :, None] * state.unsqueeze(1)).sum(-2)
    return (y if D is None else y + D.to(dtype)[:, None] * x_).to(x.dtype)
