"""The mLSTM in plain PyTorch: the specification, step by step, and the same chunk by chunk."""

import math

import torch
import torch.nn.functional as F

from ..tensors import state_dtype
from ..walk import walk


def _prepare(q, k, v, i, f):
    """All in the dtype of the states, keys divided by sqrt(P), and the logarithm of the forget gate."""
    dtype = state_dtype(q.dtype)
    q, k, v, i, f = (x.to(dtype) for x in (q, k, v, i, f))
    return q, k / q.shape[-1] ** 0.5, v, i, F.logsigmoid(f)


def floor(m):
    """exp(-m), kept finite: where it would not be, the quotient is 0 up to 1e-30 anyway."""
    return torch.exp((-m).clamp(max=0.9 * math.log(torch.finfo(m.dtype).max)))


def read(numerator, denominator, m, eps):
    """The quotient of the state's output and its normaliser."""
    return numerator / (torch.maximum(denominator.abs(), floor(m)) + eps).unsqueeze(-1)


def _step(state, x, eps):
    """One step of all heads: C is ``(B, H, P, P)``, n ``(B, H, P)`` and m ``(B, H)``."""
    (C, n, m), (q, k, v, i, log_f) = state, x
    m_new = torch.maximum(log_f + m, i)
    keep, write = torch.exp(log_f + m - m_new).unsqueeze(-1), torch.exp(i - m_new).unsqueeze(-1)
    C = keep.unsqueeze(-1) * C + (write * k).unsqueeze(-1) * v.unsqueeze(-2)
    n = keep * n + write * k
    y = read((q.unsqueeze(-1) * C).sum(-2), (q * n).sum(-1), m_new, eps)
    return (C, n, m_new), (y,)


def mlstm(q, k, v, i, f, eps, use_scan=False):
    """See `linzoo.ops.mlstm`. With `use_scan` the loop is one `torch._higher_order_ops.scan`."""
    xs = _prepare(q, k, v, i, f)
    batch, _, heads, width = q.shape
    state = (
        xs[0].new_zeros(batch, heads, width, width),
        xs[0].new_zeros(batch, heads, width),
        xs[0].new_full((batch, heads), -torch.inf),
    )
    [y] = walk(lambda state, x: _step(state, x, eps), state, xs, use_scan)
    return y.to(q.dtype)


def chunked(q, k, v, i, f, eps, chunk_size, use_scan=False):
    """As `mlstm`: masked attention within a chunk, states between chunks, and one running maximum for both.

    m is the largest logarithm of a weight, over the steps of the chunk and the state before it. The decay between two
    steps is summed separately for each pair, because differences of running sums would lose digits.
    """
    length, pad = q.shape[1], -q.shape[1] % chunk_size
    q_, k, v, i, log_f = _prepare(q, k, v, i, f)

    def chunks(x, value=0.0):  # (B, H, chunks, steps, ...)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad), value=value)
        return x.unflatten(1, (-1, chunk_size)).movedim(3, 1)

    q_, k, v, log_f = (chunks(x) for x in (q_, k, v, log_f))
    i = chunks(i, -torch.inf)  # padding steps write nothing and forget nothing
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # n is the state of a value that is always 1
    total = log_f.cumsum(3)

    mask = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=q.device).tril()
    later = mask.tril(-1)
    since = log_f.unsqueeze(4).expand(*log_f.shape, chunk_size).masked_fill(~later, 0).cumsum(3)  # from step s to t
    weight = (since + i.unsqueeze(3)).masked_fill(~mask, -torch.inf)  # (B, H, c, t, s)
    inside = weight.amax(4)
    last = since[:, :, :, -1] + i  # what each step leaves in the state after the chunk
    peak = last.amax(3)
    # A chunk of padding alone cannot be, so every maximum is finite.
    left = (k * torch.exp(last - peak.unsqueeze(3)).unsqueeze(4)).mT @ v

    def step(state, chunk):
        (S, m), (left, peak, total) = state, chunk
        decayed = total + m
        top = torch.maximum(decayed, peak)
        keep, write = torch.exp(decayed - top), torch.exp(peak - top)
        S_new = keep[..., None, None] * S + write[..., None, None] * left
        return (S_new, top), state

    xs = tuple(x.transpose(1, 2) for x in (left, peak, total[..., -1]))
    first = torch.zeros_like(left[:, :, 0]), torch.full_like(peak[:, :, 0], -torch.inf)
    states, maxima = (x.transpose(1, 2) for x in walk(step, first, xs, use_scan))
    before = total + maxima.unsqueeze(3)
    m = torch.maximum(inside, before)
    y = (q_ @ k.mT * torch.exp(weight - m.unsqueeze(4))) @ v
    y = y + torch.exp(before - m).unsqueeze(4) * (q_ @ states)
    y = read(y[..., :-1], y[..., -1], m, eps)
    return y.movedim(1, 3).flatten(1, 2)[:, :length].to(q.dtype)
