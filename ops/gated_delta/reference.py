"""The gated delta rule in plain PyTorch: the specification, step by step, and the same chunk by chunk."""

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan

from ..tensors import state_dtype


def _prepare(q, k, v, initial):
    """All in the dtype of the states, and the initial state ``(B, H, K, P)``."""
    dtype = state_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if initial is None:
        initial = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return q, k, v, initial


def _step(state, x):
    """One step of all heads."""
    q, k, v, g, beta = x
    state = torch.exp(g)[..., None, None] * state
    value = beta.unsqueeze(-1) * (v - (k.unsqueeze(-1) * state).sum(-2))
    state = state + k.unsqueeze(-1) * value.unsqueeze(-2)
    return state, (q.unsqueeze(-1) * state).sum(-2)


def gated_delta(q, k, v, g, beta, initial, use_scan=False):
    """See `linzoo.ops.gated_delta`; output and last state are one tensor ``(B, L + K, H, P)``.

    With `use_scan` the loop is one `torch._higher_order_ops.scan`.
    """
    q, k, v, state = _prepare(q, k, v, initial)
    xs = (q, k, v, g, beta)
    if use_scan:
        state, y = scan(_step, state, tuple(x.transpose(0, 1) for x in xs), dim=0)
        y = y.transpose(0, 1)
    else:
        steps = []
        for x in zip(*(x.unbind(1) for x in xs), strict=True):
            state, y = _step(state, x)
            steps.append(y)
        y = torch.stack(steps, 1)
    return torch.cat([y, state.transpose(1, 2)], 1)


def chunked(q, k, v, g, beta, initial, chunk_size):
    """As `gated_delta`. Let d_ts be the decay from step s to step t. The corrected values u of a chunk solve ::

        u_t = beta_t (v_t - d_t0 S_0^T k_t) - beta_t sum_{s < t} d_ts (k_t . k_s) u_s

    where S_0 is the state before the chunk. They depend linearly on S_0: u = U - W S_0. So does the state after the
    chunk, so only one product must be done chunk after chunk. The decay between two steps is summed
    separately for each pair, because differences of running sums would lose digits.
    """
    length = q.shape[1]
    chunk = min(chunk_size, length)
    q, k, v, state = _prepare(q, k, v, initial)

    def chunks(x):  # (B, H, chunks, steps, ...); padding steps write nothing and forget nothing
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % chunk))
        return x.unflatten(1, (-1, chunk)).movedim(3, 1)

    q, k, v, g, beta = (chunks(x) for x in (q, k, v, g, beta))
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    later = mask.tril(-1)
    since = g.unsqueeze(4).expand(*g.shape, chunk).masked_fill(~later, 0).cumsum(3)  # from step s to t
    decay = torch.exp(since).masked_fill(~mask, 0)  # (B, H, c, t, s)
    total = torch.exp(g.cumsum(3)).unsqueeze(4)  # from the chunk's start to step t
    left = decay[:, :, :, -1].unsqueeze(4)  # from step s to the chunk's end

    weight = beta.unsqueeze(4)
    system = (weight * decay * (k @ k.mT)).masked_fill(~later, 0)
    right = torch.cat([weight * v, weight * total * k], -1)
    right = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    U, W = right.split([v.shape[4], k.shape[4]], -1)
    write, keep = (left * k).mT, total[:, :, :, -1:]

    eye = torch.eye(k.shape[4], dtype=k.dtype, device=k.device)
    step, written = keep * eye - write @ W, write @ U
    states = []
    for a, b in zip(step.unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = torch.baddbmm(b.flatten(0, 1), a.flatten(0, 1), state.flatten(0, 1)).view(state.shape)
    before = torch.stack(states, 2)
    y = (decay * (q @ k.mT)) @ (U - W @ before) + (total * q) @ before
    y = y.movedim(1, 3).flatten(1, 2)[:, :length]
    return torch.cat([y, state.transpose(1, 2)], 1)
