"""WKV, the token mixers of RWKV-4, 6 and 7 for images: weighted means and matrix states that decay with distance."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operator import CHUNK, Operator
from ..tensors import check, dense_rows, promote, state_dtype
from . import cuda, reference

__all__ = ["bi_wkv", "wkv6", "wkv6_state", "wkv7", "wkv7_state"]


def bi_wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, *, order: Tensor | None = None, divide_by_length: bool = False
) -> Tensor:
    """Bidirectional WKV (Vision-RWKV, arXiv 2403.02308, eq. 5): means of v, weighted by keys and distance.

    For each batch item, channel and step t, with step t at token ``order[t]`` and T steps::

        y_t = (sum_{i != t} exp(k_i - (|t - i| - 1) w) v_i + exp(u + k_t) v_t)
            / (sum_{i != t} exp(k_i - (|t - i| - 1) w)     + exp(u + k_t))

    in time proportional to T, for any T and any w: exponents are taken relative to the largest so far. The caller
    applies the receptance. Restore-RWKV's Re-WKV (arXiv 2407.11087) applies WKV to its own output along another order,
    with no transpose: ``bi_wkv(k, bi_wkv(k, v, w0, u0), w1, u1, order=scan_order.column(H, W))``.

    The published models divide w and u by the number of tokens in the call, set by the resolution: `divide_by_length`.
    The paper's equation divides only the distance and keeps u: pass ``w / T`` and u.

    The published weights were trained with a CUDA kernel that departs from the equation. It cuts the tokens into 32
    chunks (64 in Restore-RWKV). What comes from other chunks, and from all tokens ahead, decays by one step too many.
    Tokens already passed are subtracted, but not entirely. At w = 0 there is no difference. With keys, values and
    decays from N(0, 1), and decays divided by the length, the worst of 2 x T x 192 outputs is off by 1 to 2 % of their
    standard deviation at T = 196 and by 16 to 18 % at T = 20; the logits of a Vision-RWKV-T by 0.01 %. With abs(w) near
    1 that kernel overflows. This function computes the equation, and its gradients are the equation's.

    Args:
        k: Keys ``(B, L, C)``. float64, float32, bfloat16 or float16.
        v: Values ``(B, L, C)``.
        w: Decay per channel and step ``(C,)``; with negative values, weights grow with distance.
        u: Bonus ``(C,)`` that a token adds to its own key.
        order: Integer ``(T,)`` or ``(B, T)`` with T <= L distinct tokens; None for 0 .. L-1. Output at tokens that no
            step visits is 0.
        divide_by_length: Divide w and u by T.

    Returns:
        ``(B, L, C)`` in the wider dtype of `k` and `v`; computed in float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, L or T is 0, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
        RuntimeError: a forced backend cannot run it; `order` is out of range (CPU). With ``LINZOO_DEBUG=1`` orders are
            also checked for repeated tokens, on every device.
    """
    check(k=(k, "BLC"), v=(v, "BLC"), w=(w, "C"), u=(u, "C"), order=(order, "T"))
    dtype, (k, v, w, u) = _promote((k, v), (w, u))
    if divide_by_length:
        steps = k.shape[1] if order is None else order.shape[-1]
        w, u = w / steps, u / steps
    return _bi_wkv(k, v, w, u, order).to(dtype)


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    order: Tensor | None = None,
    bidirectional: bool = True,
    initial: Tensor | None = None,
) -> Tensor:
    """WKV of RWKV-6 (arXiv 2404.05892, section 4), in both directions as in Vision-RWKV-6.

    Each head has a matrix state whose rows decay by ``d_t = exp(-exp(w_t))``, which depends on the data. For each
    step t, with step t at token ``order[t]``::

        S_0 = 0,        S_{t+1} = diag(d_t) S_t + k_t v_t^T         (steps before t, in R^(N x P))
        R_{T-1} = 0,    R_{t-1} = diag(d_t) R_t + k_t v_t^T         (steps after t; 0 unless `bidirectional`)
        y_t = (S_t + R_t + diag(u) k_t v_t^T)^T r_t

    It neither normalises nor scales: the models apply a GroupNorm after it.

    Args:
        r: Receptances ``(B, L, H, N)``. float64, float32, bfloat16 or float16.
        k: Keys ``(B, L, H, N)``.
        v: Values ``(B, L, H, P)``.
        w: Decays ``(B, L, H, N)`` before the two exponentials; a decay below the smallest float is 0.
        u: Bonus ``(H, N)`` of a token for itself, counted once.
        order: As in `bi_wkv`.
        bidirectional: Whether steps see those after them.
        initial: The state before the first step and, if `bidirectional`, the one after the last step. Values come
            before keys: ``(2, H, P, N)`` shared by all samples or ``(B, 2, H, P, N)``, with 1 instead of 2 for one
            direction; None for 0. It has a gradient.

    Returns:
        ``(B, L, H, P)`` in the widest dtype of `r`, `k`, `v` and `w`; states are float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: As in `bi_wkv`.
    """
    ends = f"{1 + bidirectional}HPN"
    ends = ends if isinstance(initial, Tensor) and initial.dim() == 4 else f"B{ends}"
    matrices = dict(r=(r, "BLHN"), k=(k, "BLHN"), v=(v, "BLHP"), w=(w, "BLHN"))
    check(**matrices, u=(u, "HN"), initial=(initial, ends), order=(order, "T"))
    dtype, (r, k, v, w, u) = _promote((r, k, v, w), (u,))
    y = _wkv6(r, k, v, w, u, order, bidirectional)
    return (y if initial is None else y + _of_ends(initial.to(y.dtype), r, w, order)).to(dtype)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, order: Tensor | None = None) -> Tensor:
    """WKV of RWKV-7 (arXiv 2503.14456, eq. 17), the generalised delta rule, along one order.

    Each head has a matrix state, whose transition is diagonal plus rank one. For each step t, with step t at token
    ``order[t]`` and ``d_t = exp(-exp(w_t))``::

        S_0 = 0,    S_t = S_{t-1} (diag(d_t) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t,    S in R^(P x N)

    RWKV-7 passes the normalised removal key kappa and the learning rate eta as ``a = -kappa``, ``b = eta * kappa``: the
    state then forgets what it holds under kappa. Its ``w = -1/2 - softplus(-x)`` keeps d above 0.545. For both
    directions of an image, add the outputs for an order and for its reverse.

    Args:
        r: Receptances ``(B, L, H, N)``. float64, float32, bfloat16 or float16.
        w: Decays ``(B, L, H, N)`` before the two exponentials.
        k: Keys ``(B, L, H, N)``.
        v: Values ``(B, L, H, P)``.
        a, b: Factors of the rank-one part ``(B, L, H, N)``.
        order: As in `bi_wkv`.

    Returns:
        ``(B, L, H, P)`` in the widest dtype of the activations; states are float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: As in `bi_wkv`.
    """
    matrices = dict(w=(w, "BLHN"), k=(k, "BLHN"), v=(v, "BLHP"), a=(a, "BLHN"), b=(b, "BLHN"))
    check(r=(r, "BLHN"), **matrices, order=(order, "T"))
    dtype, (r, w, k, v, a, b) = _promote((r, w, k, v, a, b))
    return _wkv7(r, w, k, v, a, b, order).to(dtype)


def wkv6_state(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial: Tensor | None = None,
    *,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv6` in one direction, with an initial and a final state: cut a sequence, and continue from the last state.

    N extra steps at either end write and read the states, so every backend and every derivative is that of `wkv6`.

    Args:
        r, k, v, w, u: As in `wkv6`.
        initial: S_0 with values before keys ``(B, H, P, N)``, or ``(H, P, N)`` shared by all samples; None for 0.
        order: As in `bi_wkv`: the first step is at token ``order[0]``.

    Returns:
        y ``(B, L, H, P)``, and the state after the last step ``(B, H, P, N)`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: As in `wkv6`.
    """
    check(
        r=(r, "BLHN"), k=(k, "BLHN"), v=(v, "BLHP"), w=(w, "BLHN"), u=(u, "HN"), **_named(initial), order=(order, "T")
    )
    dtype, (r, k, v, w, u) = _promote((r, k, v, w), (u,))
    front, back = _writes(initial, k, v), _reads(k, v)
    parts = [_joined(f, x, b) for f, x, b in zip(front, (r, k, v, w), back, strict=True)]
    order = _between(order, front[0], r, back[0])
    return _split(_wkv6(*parts, u, order, False), front[0], back[0], dtype)


def wkv7_state(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    *,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` with an initial and a final state; see `wkv6_state`.

    Args:
        r, w, k, v, a, b: As in `wkv7`.
        initial: S_0 ``(B, H, P, N)``, or ``(H, P, N)`` shared by all samples; None for 0.
        order: As in `bi_wkv`.

    Returns:
        y ``(B, L, H, P)``, and the state after the last step ``(B, H, P, N)`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: As in `wkv7`.
    """
    matrices = dict(w=(w, "BLHN"), k=(k, "BLHN"), v=(v, "BLHP"), a=(a, "BLHN"), b=(b, "BLHN"))
    check(r=(r, "BLHN"), **matrices, **_named(initial), order=(order, "T"))
    dtype, (r, w, k, v, a, b) = _promote((r, w, k, v, a, b))
    front, back = _writes(initial, k, v), _reads(k, v)
    parts = [_joined(f, x, b) for f, x, b in zip(front, (r, k, v, w), back, strict=True)]
    none = [x.new_zeros(x.shape[0], 1, *x.shape[2:]) for x in (a, b)]
    a, b = (
        torch.cat([zero.expand(-1, front[0].shape[1], -1, -1), x, zero.expand(-1, back[0].shape[1], -1, -1)], 1)
        for zero, x in zip(none, (a, b), strict=True)
    )
    order = _between(order, front[0], r, back[0])
    r, k, v, w = parts
    return _split(_wkv7(r, w, k, v, a, b, order), front[0], back[0], dtype)


def _of_ends(initial, r, w, order):
    """What the states at the ends add to the output of `wkv6`: ``initial (r_t * product of the decays between)``."""
    place, length = None, r.shape[1]
    if order is not None:
        place = order.long().expand(r.shape[0], -1)[..., None, None].expand(-1, -1, *r.shape[2:])
        r, w = r.gather(1, place), w.gather(1, place)
    decay = -w.clamp(max=LARGEST).exp()
    shape = "hpn" if initial.dim() == 4 else "bhpn"
    added = []
    for end, state in enumerate(initial.unbind(-4)):  # the second is at the last step: decays run backwards
        past = (decay.flip(1) if end else decay)[:, :-1].cumsum(1)
        past = F.pad(past, (0, 0, 0, 0, 1, 0)).exp()
        added.append(torch.einsum(f"bthn,{shape}->bthp", r * (past.flip(1) if end else past), state))
    y = torch.stack(added).sum(0)
    if place is None:
        return y
    return y.new_zeros(y.shape[0], length, *y.shape[2:]).scatter(1, place[..., :1].expand_as(y), y)


LARGEST = 80.0  # before the exponentials: the decay is 0 in any dtype
STILL = -100.0  # before the exponentials: the decay is 1 in any dtype


def _named(initial):
    return {"initial": (initial, "HPN" if isinstance(initial, Tensor) and initial.dim() == 3 else "BHPN")}


def _one_hot(k, steps):
    """Step i of N at channel i ``(B, N, H, N)``; no steps if `steps` is 0."""
    return torch.eye(k.shape[3], dtype=k.dtype, device=k.device)[None, :steps, None].expand(
        k.shape[0], -1, k.shape[2], -1
    )


def _writes(initial, k, v):
    """Receptances, keys, values and decays of N steps that write a state, row by row; no steps for 0."""
    at = _one_hot(k, k.shape[3] if initial is not None else 0)
    if initial is None:
        rows = v.new_zeros(v.shape[0], 0, *v.shape[2:])
    else:
        state = initial.to(v.dtype)
        state = state.expand(v.shape[0], *state.shape) if state.dim() == 3 else state
        rows = state.permute(0, 3, 1, 2)  # (B, N, H, P)
    return torch.zeros_like(at), at, rows, torch.full_like(at, STILL)


def _reads(k, v):
    """The same for N steps that read the state."""
    at = _one_hot(k, k.shape[3])
    return at, torch.zeros_like(at), v.new_zeros(v.shape[0], at.shape[1], *v.shape[2:]), torch.full_like(at, STILL)


def _joined(front, x, back):
    return torch.cat([front, x, back], 1)


def _between(order, front, x, back):
    """The order of joined parts: those at the ends in sequence, the middle by `order`."""
    if order is None:
        return None
    first, last = front.shape[1], front.shape[1] + x.shape[1]
    at = torch.arange(last + back.shape[1], dtype=order.dtype, device=order.device)
    return torch.cat(
        [at[:first].expand(*order.shape[:-1], -1), order + first, at[last:].expand(*order.shape[:-1], -1)], -1
    )


def _split(y, front, back, dtype):
    """The output of the real steps, and the state ``(B, H, P, N)`` read by the last ones."""
    first, last = front.shape[1], y.shape[1] - back.shape[1]
    return y[:, first:last].to(dtype), y[:, last:].permute(0, 2, 3, 1)


def _promote(activations, parameters=()):
    """The activations' widest dtype, and all tensors in the dtype of its states."""
    dtype = promote(*activations)
    return dtype, [x.to(state_dtype(dtype)) for x in (*activations, *parameters)]


def _kernel_inputs(order, **tensors):
    """Activations with contiguous channels, and the order in int32."""
    named = {name: None if x is None else dense_rows(x) for name, x in tensors.items()}
    return named | dict(order=None if order is None else order.to(torch.int32).contiguous())


def _outputs(x, order, *shapes):
    """Tensors of these shapes for a kernel to write; filled with 0 if some tokens are not visited."""
    new = x.new_empty if order is None or order.shape[-1] == x.shape[1] else x.new_zeros
    return [new(shape) for shape in shapes]


def _steps(k, order):
    return k[1] if order is None else order[-1]


# --- bi_wkv ---------------------------------------------------------------------------------------------------------
# Its second result is (B, L, 2, C): the largest exponent m of each step's weights, and the sum of the weights divided
# by exp(m). Without it the backward pass runs the forward pass again. (A single logarithm of both would lose digits.)


def _bi_reference(k, v, w, u, order, save, use_scan=False):
    y, scale = reference.bi_wkv(k, v, w, u, order, use_scan)
    return y, scale if save else k.new_empty(0)


def _scale_shape(k, save):
    return (*k.shape[:2], 2, k.shape[2]) if save else (0,)


def _bi_empty(k, v, w, u, order, save):
    return k.new_empty(k.shape), k.new_empty(_scale_shape(k, save))


def _bi_forward(backend, k, v, w, u, order, save):
    y, scale = _outputs(k, order, k.shape, _scale_shape(k, save))
    named = _kernel_inputs(order, k=k, v=v, w=w.contiguous(), u=u.contiguous())
    kernel = cuda.bi_forward if backend == "cuda" else torch.ops.linzoo_cpu.bi_wkv_forward
    kernel(**named, y=y, scale=scale)
    return y, scale


def _bi_backward(backend, dy, k, v, w, u, order, y, scale):
    if scale.dim() == 1:
        y, scale = _bi_forward(backend, k, v, w, u, order, True)
    parts = k.shape[0]
    if backend == "cuda":
        parts *= cuda.bi_plan(k, k.shape[1] if order is None else order.shape[-1])[2]
    dk, dv = _outputs(k, order, k.shape, k.shape)
    dw, du = (k.new_empty(parts, k.shape[2]) for _ in range(2))
    named = _kernel_inputs(order, dy=dy, k=k, v=v, w=w.contiguous(), u=u.contiguous(), y=y, scale=scale)
    kernel = cuda.bi_backward if backend == "cuda" else torch.ops.linzoo_cpu.bi_wkv_backward
    kernel(**named, dk=dk, dv=dv, dw=dw, du=du)
    return [dk, dv, dw.sum(0), du.sum(0)]


def _bi_flops(k, order, **_):
    """13 per step and channel: the count of the paper (eq. 8)."""
    return 13 * k[0] * _steps(k, order) * k[2]


_bi_wkv = Operator(
    "bi_wkv",
    "(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, bool save) -> (Tensor y, Tensor scale)",
    kernel="wkv",
    reference=_bi_reference,
    export=functools.partial(_bi_reference, use_scan=True),
    chunked=lambda *x: reference.bi_wkv_chunked(*x[:-1]),
    forward=_bi_forward,
    backward=_bi_backward,
    fake=_bi_empty,
    flops=_bi_flops,
    keep_first=True,
)


# --- wkv6 and wkv7 --------------------------------------------------------------------------------------------------
# Their second result holds the states before each chunk of CHUNK steps. The backward pass recomputes the others from
# them; without them it runs the forward pass again. One kernel serves both operators.


def _stored(states, k, save):
    """What the kernels store, from one list entry ``(B, T, H, N, P)`` per direction."""
    chunk = CHUNK.get(k.device.type, 1)
    return torch.stack([s[:, ::chunk].transpose(1, 2) for s in states]) if save else k.new_empty(0)


def _empty(k, v, order, directions, save):
    chunk, steps = CHUNK.get(k.device.type, 1), _steps(k.shape, None if order is None else order.shape)
    shape = directions, k.shape[0], k.shape[2], (steps + chunk - 1) // chunk, k.shape[3], v.shape[3]
    return v.new_empty(v.shape), k.new_empty(shape if save else (0,))


def _limit(backend, k, v):
    """The CUDA kernels hold a column of the state per thread, which limits the channels."""
    widest = max(k.shape[3], v.shape[3])
    if backend == "cuda" and widest > cuda.MAX_CHANNELS:
        return f"the CUDA kernel takes heads of at most {cuda.MAX_CHANNELS} channels, got {widest}"
    return None


def _forward(backend, order, directions, save, *, r, w, k, v, u=None, a=None, b=None):
    parts = (directions,) if backend == "cuda" else ()  # each direction writes its own part of the sum
    (y,) = _outputs(v, order, (*parts, *v.shape))
    states = _empty(k, v, order, directions, save)[1]
    u = None if u is None else u.contiguous()
    kernel = cuda.forward if backend == "cuda" else torch.ops.linzoo_cpu.wkv_forward
    kernel(**_kernel_inputs(order, r=r, w=w, k=k, v=v, a=a, b=b), u=u, directions=directions, y=y, states=states)
    return y.sum(0) if backend == "cuda" else y, states


def _backward(backend, dy, order, directions, states, *, r, w, k, v, u=None, a=None, b=None):
    """Gradients by name; empty tensors for arguments that are None."""
    tensors = dict(r=r, w=w, k=k, v=v, a=a, b=b)
    parts = (directions,) if backend == "cuda" else ()
    shapes = [(*parts, *((0,) if x is None else x.shape)) for x in tensors.values()]
    grads = dict(zip((f"d{name}" for name in tensors), _outputs(k, order, *shapes), strict=True))
    grads["du"] = k.new_empty(*parts, 0) if u is None else k.new_zeros(*parts, k.shape[0], *u.shape)
    u = None if u is None else u.contiguous()
    kernel = cuda.backward if backend == "cuda" else torch.ops.linzoo_cpu.wkv_backward
    kernel(**_kernel_inputs(order, dy=dy, **tensors), u=u, directions=directions, states=states, **grads)
    if backend == "cuda":
        grads = {name: x.sum(0) for name, x in grads.items()}
    return grads | dict(du=grads["du"].sum(0))


def _wkv6_reference(r, k, v, w, u, order, bidirectional, save, use_scan=False):
    y, states = reference.wkv6(r, k, v, w, u, order, bidirectional, use_scan)
    return y, _stored(states, k, save)


def _wkv6_forward(backend, r, k, v, w, u, order, bidirectional, save):
    return _forward(backend, order, 1 + bidirectional, save, r=r, w=w, k=k, v=v, u=u)


def _wkv6_backward(backend, dy, r, k, v, w, u, order, bidirectional, states):
    if states.dim() == 1:
        states = _wkv6_forward(backend, r, k, v, w, u, order, bidirectional, True)[1]
    grads = _backward(backend, dy, order, 1 + bidirectional, states, r=r, w=w, k=k, v=v, u=u)
    return [grads[name] for name in ("dr", "dk", "dv", "dw", "du")]


def _wkv6_flops(k, v, order, bidirectional, **_):
    """7 N P per step and head for both directions, as in Vision-RWKV's script: 3 (decay, write, read) for each, 1
    for the token itself."""
    return (1 + 3 * (1 + bidirectional)) * k[0] * _steps(k, order) * k[2] * k[3] * v[3]


_wkv6 = Operator(
    "wkv6",
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, bool bidirectional, bool save) "
    "-> (Tensor y, Tensor states)",
    kernel="wkv",
    reference=_wkv6_reference,
    export=functools.partial(_wkv6_reference, use_scan=True),
    chunked=lambda *x: reference.wkv6_chunked(*x[:-1]),
    forward=_wkv6_forward,
    backward=_wkv6_backward,
    fake=lambda r, k, v, w, u, order, bidirectional, save: _empty(k, v, order, 1 + bidirectional, save),
    flops=_wkv6_flops,
    limit=lambda backend, *x: _limit(backend, *x[1:3]),
)


def _wkv7_reference(r, w, k, v, a, b, order, save, use_scan=False):
    y, states = reference.wkv7(r, w, k, v, a, b, order, use_scan)
    return y, _stored([states], k, save)


def _wkv7_forward(backend, r, w, k, v, a, b, order, save):
    return _forward(backend, order, 1, save, r=r, w=w, k=k, v=v, a=a, b=b)


def _wkv7_backward(backend, dy, r, w, k, v, a, b, order, states):
    if states.dim() == 1:
        states = _wkv7_forward(backend, r, w, k, v, a, b, order, True)[1]
    grads = _backward(backend, dy, order, 1, states, r=r, w=w, k=k, v=v, a=a, b=b)
    return [grads[name] for name in ("dr", "dw", "dk", "dv", "da", "db")]


def _wkv7_flops(k, v, order, **_):
    """5 N P per step and head: the decay, what `a` reads, what `b` writes, what k writes, what r reads."""
    return 5 * k[0] * _steps(k, order) * k[2] * k[3] * v[3]


_wkv7 = Operator(
    "wkv7",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? order, bool save) "
    "-> (Tensor y, Tensor states)",
    kernel="wkv",
    reference=_wkv7_reference,
    export=functools.partial(_wkv7_reference, use_scan=True),
    forward=_wkv7_forward,
    backward=_wkv7_backward,
    fake=lambda r, w, k, v, a, b, order, save: _empty(k, v, order, 1, save),
    flops=_wkv7_flops,
    limit=lambda backend, *x: _limit(backend, *x[2:4]),
)
