"""The WKV operators in plain PyTorch: the specification, step by step. Autograd gives their gradients.

Activations are in the state's dtype here.
"""

import torch
import torch.nn.functional as F

from ..walk import walk

CHUNK = 16  # steps in a chunk of the chunked forms


def tokens_in_order(x, order):
    """``(B, L, ...)`` to ``(B, T, ...)``: step t is token ``order[t]``."""
    return x if order is None else x[_index(x, order)]


def tokens_in_place(y, order, length):
    """Inverse of `tokens_in_order`; tokens that no step visits are 0."""
    if order is None:
        return y
    return y.new_zeros(y.shape[0], length, *y.shape[2:]).index_put(_index(y, order), y)


def _index(x, order):
    return torch.arange(x.shape[0], device=x.device).unsqueeze(1), order.long().expand(x.shape[0], order.shape[-1])


def _reversed(f, *xs):
    return tuple(y.flip(1) for y in f(*(x.flip(1) for x in xs)))


# --- bi_wkv ---------------------------------------------------------------------------------------------------------


def _past(k, x, y, w, use_scan=False):
    """Decayed sums over the steps before each, ``sum_{i<t} exp(k_i - (t - i - 1) w) (x_i, y_i)``, free of overflow.

    Returns:
        The largest exponent m, and the sums of x, y, (t - i - 1) x and (t - i - 1) y, divided by exp(m).
    """

    def step(state, inputs):
        (top, age, *sums), (key, *values) = state, inputs
        gap = key - (top - (age + 1) * w)  # relative to the largest weight so far: key `top` at distance `age`
        old, new = torch.exp(-gap.clamp(min=0)), torch.exp(gap.clamp(max=0))
        near = [old * s + new * value for s, value in zip(sums[:2], values, strict=True)]
        far = [old * (s + d) for s, d in zip(sums[:2], sums[2:], strict=True)]
        top, after = torch.where(gap > 0, key, top), torch.where(gap > 0, 0, age + 1)
        return (top, after, *near, *far), (state[0] - age * w, *sums)

    zero = torch.zeros_like(k[:, 0])
    return walk(step, (zero - torch.inf, *[zero.clone() for _ in range(5)]), (k, x, y), use_scan)


def bi_wkv(k, v, w, u, order=None, use_scan=False):
    """See `linzoo.ops.bi_wkv`. With `use_scan` the loops are `torch._higher_order_ops.scan`.

    Returns:
        The output, and ``(B, L, 2, C)``: the largest exponent m of each step's weights, and their sum divided by
        exp(m).
    """
    length = k.shape[1]
    k, v = tokens_in_order(k, order), tokens_in_order(v, order)

    def past(k, v):
        return _past(k, v, torch.ones_like(v), w, use_scan)

    sides = [past(k, v), _reversed(past, k, v)]
    own = u + k
    peak = torch.maximum(torch.maximum(sides[0][0], sides[1][0]), own)
    weight = torch.exp(own - peak)
    num, den = weight * v, weight
    for top, x, one, *_ in sides:
        weight = torch.exp(top - peak)
        num, den = num + weight * x, den + weight * one
    scale = torch.stack([peak, den], 2)
    return tokens_in_place(num / den, order, length), tokens_in_place(scale, order, length)


def bi_wkv_chunked(k, v, w, u, order=None):
    """The output of `bi_wkv`, for a fixed length, by chunks: all pairs within one, sums over what lies on either side.

    Each sum keeps its largest exponent apart, as in `bi_wkv`.
    """
    length = k.shape[1]
    k, v = tokens_in_order(k, order), tokens_in_order(v, order)
    steps, size = k.shape[1], CHUNK

    def chunks(x, value=0.0):  # (B, chunks, steps, C); padding steps have no weight
        return F.pad(x, (0, 0, 0, -steps % size), value=value).unflatten(1, (-1, size))

    k, v = chunks(k, -torch.inf), chunks(v)
    v = torch.stack([v, torch.ones_like(v)])  # numerator and denominator
    at = torch.arange(size, device=k.device, dtype=k.dtype).unsqueeze(1)

    def side(k, v):
        """Exponent and sums of what lies before each chunk, one step before its first."""
        exponents = k - (size - 1 - at) * w
        peaks = exponents.amax(2)
        sums = (torch.exp(exponents - peaks.unsqueeze(2)) * v).sum(3)

        def step(state, chunk):
            (top, *totals), (peak, *adds) = state, chunk
            old = top - size * w
            top = torch.maximum(old, peak)
            keep, write = torch.exp(old - top), torch.exp(peak - top)
            return (top, *(keep * x + write * add for x, add in zip(totals, adds, strict=True))), state

        zero = torch.zeros_like(peaks[:, 0])
        tops, *totals = walk(step, (zero - torch.inf, zero, zero.clone()), (peaks, *sums), use_scan=True)
        return tops.unsqueeze(2), torch.stack(totals).unsqueeze(3)

    past, (tops, totals) = side(k, v), side(k.flip(1, 2), v.flip(2, 3))
    sides = [(past[0] - at * w, past[1]), (tops.flip(1) - (size - 1 - at) * w, totals.flip(2))]
    distance = (at - at.mT).abs().unsqueeze(2)  # (t, s, 1)
    pairs = k.unsqueeze(2) - torch.where(distance == 0, -u, (distance - 1) * w)  # (B, chunks, t, s, C)
    peak = torch.maximum(pairs.amax(3), torch.maximum(sides[0][0], sides[1][0]))
    sums = (torch.exp(pairs - peak.unsqueeze(3)) * v.unsqueeze(3)).sum(4)
    for top, total in sides:
        sums = sums + torch.exp(top - peak) * total
    y = (sums[0] / sums[1]).flatten(1, 2)[:, :steps]
    return tokens_in_place(y, order, length)


# --- wkv6 -----------------------------------------------------------------------------------------------------------


def _decay(w):
    """``exp(-exp(w))``; beyond 32 it is 0 in any dtype, and so is its derivative."""
    return torch.exp(-torch.exp(w.clamp(max=32)))


def _outer(x, y):
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _wkv6_past(r, k, v, decay, use_scan=False):
    """What each step reads from the state of the steps before it, and that state ``(B, H, N, P)``."""

    def step(S, x):
        r, k, v, decay = x
        y = (r.unsqueeze(-1) * S).sum(-2)
        return decay.unsqueeze(-1) * S + _outer(k, v), ((y,) if use_scan else (y, S))

    return walk(step, _outer(torch.zeros_like(k[:, 0]), torch.zeros_like(v[:, 0])), (r, k, v, decay), use_scan)


def wkv6(r, k, v, w, u, order=None, bidirectional=True, use_scan=False):
    """See `linzoo.ops.wkv6`.

    Returns:
        The output, and for each direction the states before its steps ``(B, T, H, N, P)`` (none with `use_scan`).
    """
    length = k.shape[1]
    xs = [tokens_in_order(x, order) for x in (r, k, v, _decay(w))]
    r, k, v, _ = xs
    y, *states = _wkv6_past(*xs, use_scan=use_scan)
    y = y + (r * u * k).sum(-1, keepdim=True) * v
    if bidirectional:
        future, *after = _wkv6_past(*(x.flip(1) for x in xs), use_scan=use_scan)
        y, states = y + future.flip(1), states + after
    return tokens_in_place(y, order, length), states


def _wkv6_past_chunked(r, k, v, w):
    """What each step reads from the state of the steps before it, for a fixed length, by products over chunks.

    Logarithms of decays are summed separately for each pair of steps, so no factor exceeds 1 and no digits are lost.
    """
    steps, size = k.shape[1], CHUNK

    def chunks(x):  # (B, H, chunks, steps, N); padding steps write nothing and forget nothing
        return F.pad(x, (0, 0, 0, 0, 0, -steps % size)).unflatten(1, (-1, size)).movedim(3, 1)

    r, k, v, log_decay = (chunks(x) for x in (r, k, v, -torch.exp(w.clamp(max=32))))
    at = torch.arange(size, device=k.device)
    t, s, j = at.view(-1, 1, 1), at.view(1, -1, 1), at.view(1, 1, -1)
    between = ((s < j) & (j < t)).to(k.dtype).flatten(0, 1)  # which decays lie between steps s and t
    past = (s < t).to(k.dtype)
    decay = torch.exp(between @ log_decay).unflatten(3, (size, size)) * past  # (B, H, chunks, t, s, N)
    y = (r.unsqueeze(4) * k.unsqueeze(3) * decay).sum(-1) @ v

    total = torch.exp(log_decay.sum(3)).unsqueeze(-1)
    left = (k * torch.exp((s < j)[0].to(k.dtype) @ log_decay)).mT @ v

    def step(state, chunk):
        (S,), (keep, write) = state, chunk
        return (keep * S + write,), (S,)

    [before] = walk(step, (torch.zeros_like(left[:, :, 0]),), (total.transpose(1, 2), left.transpose(1, 2)), True)
    y = y + (r * torch.exp((j < t)[:, 0].to(k.dtype) @ log_decay)) @ before.transpose(1, 2)
    return y.movedim(1, 3).flatten(1, 2)[:, :steps]


def wkv6_chunked(r, k, v, w, u, order=None, bidirectional=True):
    """The output of `wkv6`, for a fixed length, by matrix products over chunks."""
    length = k.shape[1]
    xs = [tokens_in_order(x, order) for x in (r, k, v, w)]
    r, k, v, _ = xs
    y = _wkv6_past_chunked(*xs) + (r * u * k).sum(-1, keepdim=True) * v
    if bidirectional:
        y = y + _wkv6_past_chunked(*(x.flip(1) for x in xs)).flip(1)
    return tokens_in_place(y, order, length)


# --- wkv7 -----------------------------------------------------------------------------------------------------------


def wkv7(r, w, k, v, a, b, order=None, use_scan=False):
    """See `linzoo.ops.wkv7`; here the state is transposed, ``(B, H, N, P)``.

    Returns:
        The output, and the states before the steps ``(B, T, H, N, P)`` (None with `use_scan`).
    """

    def step(S, x):
        r, decay, k, v, a, b = x
        erased = (a.unsqueeze(-1) * S).sum(-2)
        after = decay.unsqueeze(-1) * S + _outer(b, erased) + _outer(k, v)
        y = (r.unsqueeze(-1) * after).sum(-2)
        return after, ((y,) if use_scan else (y, S))

    xs = [tokens_in_order(x, order) for x in (r, _decay(w), k, v, a, b)]
    y, *states = walk(step, _outer(torch.zeros_like(k[:, 0]), torch.zeros_like(v[:, 0])), xs, use_scan)
    return tokens_in_place(y, order, k.shape[1]), (None if use_scan else states[0])
