"""WKV, the token mixers of RWKV-4, 6 and 7 for images: weighted means and matrix states that decay with distance."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backend import fall_back, forced_backend, resolve
from ..selective_scan import _check_order
from ..selective_scan.reference import state_dtype
from . import cuda, reference

__all__ = ["bi_wkv", "wkv6", "wkv7"]

CHUNK = {"cpu": 32, "cuda": 16}  # steps between two stored matrix states; also kChunk in cpu.cpp and cuda.cu

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def bi_wkv(k, v, w, u, *, order=None, divide_by_length=False):
    """Bidirectional WKV (Vision-RWKV, arXiv 2403.02308, eq. 5): means of v weighted by keys and distance.

    For each batch item, channel and step t, with step t at token ``order[t]`` and T steps::

        y_t = (sum_{i != t} exp(k_i - (|t - i| - 1) w) v_i + exp(u + k_t) v_t)
            / (sum_{i != t} exp(k_i - (|t - i| - 1) w)     + exp(u + k_t))

    in time proportional to T, for any T and any w: exponents are taken relative to the largest so far. The receptance
    is the caller's. Restore-RWKV's Re-WKV (arXiv 2407.11087) applies it to its own output along another order, with
    nothing transposed: ``bi_wkv(k, bi_wkv(k, v, w0, u0), w1, u1, order=scan_order.column(H, W))``.

    The published models divide w and u by the number of tokens of the call, their resolution's: `divide_by_length`. The
    paper's equation divides the distance alone, its u stays as it is: pass ``w / T`` and u.

    The CUDA kernel that the published weights were trained with departs from the equation. It cuts the tokens into 32
    chunks (64 in Restore-RWKV), decays what comes from other chunks and all that lies ahead by one step too many, and
    subtracts what it has passed without taking it away entirely. At w = 0 there is no difference. For keys, values and
    decays of N(0, 1), the decays divided by the length, the worst of 2 x T x 192 outputs is off by 1 to 2 % of their
    standard deviation at T = 196 and by 16 to 18 % at T = 20; the logits of a Vision-RWKV-T by 0.01 %. With abs(w) near
    1 the kernel overflows. This function computes the equation, and its gradients are the equation's.

    Args:
        k: Keys ``(B, L, C)``. float64, float32, bfloat16 or float16.
        v: Values ``(B, L, C)``.
        w: Decay per channel and step ``(C,)``; negative ones let weights grow with distance.
        u: Bonus ``(C,)`` on a token's key for itself.
        order: Integer ``(T,)`` or ``(B, T)`` with T <= L distinct tokens; None for 0 .. L-1. Output at tokens that no
            step visits is 0.
        divide_by_length: Divide w and u by T.

    Returns:
        ``(B, L, C)`` in the wider dtype of `k` and `v`; computed in float32, float64 for float64.

    Raises:
        ValueError: a shape does not fit, L or T is 0.
        TypeError: a dtype is not supported.
        RuntimeError: tensors on different devices; a forced backend cannot serve; `order` out of range (CPU).
            With ``LINZOO_DEBUG=1`` orders are also checked for repeated tokens, on every device.
    """
    if k.dim() != 3:
        raise ValueError(f"k: expected (B, L, C), got {tuple(k.shape)}")
    _check({"k": (k, "BLC"), "v": (v, "BLC"), "w": (w, "C"), "u": (u, "C")}, order)
    dtype, (k, v, w, u) = _promote((k, v), (w, u))
    if divide_by_length:
        steps = k.shape[1] if order is None else order.shape[-1]
        w, u = w / steps, u / steps
    if forced_backend() == "export":
        return reference.bi_wkv(k, v, w, u, order, use_scan=True)[0].to(dtype)
    return torch.ops.linzoo.bi_wkv(k, v, w, u, order, _save(k, v, w, u))[0].to(dtype)


def wkv6(r, k, v, w, u, *, order=None, bidirectional=True):
    """WKV of RWKV-6 (arXiv 2404.05892, section 4), in both directions as in Vision-RWKV-6.

    Per head a matrix state whose rows decay by ``d_t = exp(-exp(w_t))``, which depends on the data. For each step t,
    with step t at token ``order[t]``::

        S_0 = 0,        S_{t+1} = diag(d_t) S_t + k_t v_t^T         (steps before t, in R^(N x P))
        R_{T-1} = 0,    R_{t-1} = diag(d_t) R_t + k_t v_t^T         (steps after t; 0 unless `bidirectional`)
        y_t = (S_t + R_t + diag(u) k_t v_t^T)^T r_t

    Neither a normalisation nor a scale: the models put a GroupNorm behind it.

    Args:
        r: Receptances ``(B, L, H, N)``. float64, float32, bfloat16 or float16.
        k: Keys ``(B, L, H, N)``.
        v: Values ``(B, L, H, P)``.
        w: Decays ``(B, L, H, N)`` before the two exponentials; a decay below the smallest float is 0.
        u: Bonus ``(H, N)`` of a token for itself, counted once.
        order: As `bi_wkv`.
        bidirectional: Whether steps see those after them.

    Returns:
        ``(B, L, H, P)`` in the widest dtype of `r`, `k`, `v` and `w`; states are float32, float64 for float64.

    Raises:
        As `bi_wkv`.
    """
    if r.dim() != 4 or v.dim() != 4:
        raise ValueError(f"r, v: expected (B, L, H, N) and (B, L, H, P), got {tuple(r.shape)} and {tuple(v.shape)}")
    _check({"r": (r, "BLHN"), "k": (k, "BLHN"), "v": (v, "BLHP"), "w": (w, "BLHN"), "u": (u, "HN")}, order)
    dtype, (r, k, v, w, u) = _promote((r, k, v, w), (u,))
    if forced_backend() == "export":
        return reference.wkv6(r, k, v, w, u, order, bidirectional, use_scan=True)[0].to(dtype)
    save = _save(r, k, v, w, u)
    return torch.ops.linzoo.wkv6(r, k, v, w, u, order, bidirectional, save)[0].to(dtype)


def wkv7(r, w, k, v, a, b, *, order=None):
    """WKV of RWKV-7 (arXiv 2503.14456, eq. 17), the generalised delta rule, along one order.

    Per head a matrix state, whose transition is diagonal plus rank one. For each step t, with step t at token
    ``order[t]`` and ``d_t = exp(-exp(w_t))``::

        S_0 = 0,    S_t = S_{t-1} (diag(d_t) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t,    S in R^(P x N)

    RWKV-7 passes the normalised removal key kappa and the learning rate eta as ``a = -kappa``, ``b = eta * kappa``: the
    state then forgets what it holds under kappa. Its ``w = -1/2 - softplus(-x)`` keeps d above 0.545. For both
    directions of an image add the outputs of an order and of its reverse.

    Args:
        r: Receptances ``(B, L, H, N)``. float64, float32, bfloat16 or float16.
        w: Decays ``(B, L, H, N)`` before the two exponentials.
        k: Keys ``(B, L, H, N)``.
        v: Values ``(B, L, H, P)``.
        a, b: Factors of the rank-one part ``(B, L, H, N)``.
        order: As `bi_wkv`.

    Returns:
        ``(B, L, H, P)`` in the widest dtype of the activations; states are float32, float64 for float64.

    Raises:
        As `bi_wkv`.
    """
    if r.dim() != 4 or v.dim() != 4:
        raise ValueError(f"r, v: expected (B, L, H, N) and (B, L, H, P), got {tuple(r.shape)} and {tuple(v.shape)}")
    named = {"r": (r, "BLHN"), "w": (w, "BLHN"), "k": (k, "BLHN"), "v": (v, "BLHP")}
    _check(named | {"a": (a, "BLHN"), "b": (b, "BLHN")}, order)
    dtype, (r, w, k, v, a, b) = _promote((r, w, k, v, a, b))
    if forced_backend() == "export":
        return reference.wkv7(r, w, k, v, a, b, order, use_scan=True)[0].to(dtype)
    save = _save(r, w, k, v, a, b)
    return torch.ops.linzoo.wkv7(r, w, k, v, a, b, order, save)[0].to(dtype)


def _check(named, order):
    """`named`: ``{argument: (tensor, letters of its shape)}``, the first of them with a shape that is right."""
    sizes, (first, device) = {}, next((name, tensor.device) for name, (tensor, _) in named.items())
    for tensor, letters in named.values():
        if tensor.dim() == len(letters):
            sizes = dict(zip(letters, tensor.shape, strict=True)) | sizes
    for name, (tensor, letters) in named.items():
        expected = tuple(sizes[letter] for letter in letters)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected ({', '.join(letters)}) = {expected}, got {tuple(tensor.shape)}")
        if 0 in expected[len(letters) > 2 :]:
            raise ValueError(f"{name}: every size but the batch must be positive, got {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(f"{name}: expected on {device} as {first}, got {tensor.device}")
    if order is None:
        return
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order: expected int32 or int64, got {order.dtype}")
    if order.device != device:
        raise RuntimeError(f"order: expected on {device} as {first}, got {order.device}")
    batch, length, shape = sizes["B"], sizes["L"], tuple(order.shape)
    if len(shape) not in (1, 2) or not 0 < shape[-1] <= length or (len(shape) == 2 and shape[0] != batch):
        raise ValueError(
            f"order: expected (T,) or (B, T) with B = {batch}, 0 < T <= L = {length}, got {tuple(order.shape)}"
        )


def _promote(activations, parameters=()):
    """The activations' widest dtype, and all tensors in the dtype of its states."""
    dtype = activations[0].dtype
    for x in activations:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype, [x.to(state_dtype(dtype)) for x in (*activations, *parameters)]


def _save(*tensors):
    """Whether the backward pass will want what the forward pass can keep; a program for export is for any length."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and not torch.compiler.is_exporting()


def _kernel_inputs(tensors, order):
    """Activations with contiguous channels, and the order in int32."""
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return tensors, None if order is None else order.to(torch.int32).contiguous()


def _outputs(x, order, *shapes):
    """Tensors of such shapes for a kernel to write; filled with 0 if there are tokens that no step visits."""
    new = x.new_empty if order is None or order.shape[-1] == x.shape[1] else x.new_zeros
    return [new(shape) for shape in shapes]


# --- registration of bi_wkv -----------------------------------------------------------------------------------------
# It returns its output and, if `save`, the logarithm of its denominator; without that the backward pass runs the
# forward pass again.

torch.library.define(
    "linzoo::bi_wkv", "(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, bool save) -> (Tensor y, Tensor log_den)"
)
torch.library.define(
    "linzoo::bi_wkv_backward",
    "(Tensor dy, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, Tensor y, Tensor log_den) -> Tensor[]",
)


def _bi_wkv(k, v, w, u, order, save):
    _check_order(order, k.shape[1])
    backend = resolve("wkv", k.device)
    if backend == "reference":
        y, log_den = reference.bi_wkv(k, v, w, u, order)
        return y.contiguous(), log_den.contiguous() if save else k.new_empty(0)
    y, log_den = _outputs(k, order, k.shape, k.shape if save else (0,))
    (k, v), order = _kernel_inputs((k, v), order)
    kernel = cuda.bi_forward if backend == "cuda" else torch.ops.linzoo_cpu.bi_wkv_forward
    kernel(k, v, w.contiguous(), u.contiguous(), order, y, log_den)
    return y, log_den


@torch.library.register_fake("linzoo::bi_wkv")
def _bi_wkv_fake(k, v, w, u, order, save):
    return k.new_empty(k.shape), k.new_empty(k.shape if save else (0,))


def _bi_wkv_backward(dy, k, v, w, u, order, y, log_den):
    if log_den.dim() == 1:
        y, log_den = _bi_wkv(k, v, w, u, order, True)
    backend, parts = resolve("wkv", k.device), k.shape[0]
    if backend == "reference":
        return [g.contiguous() for g in reference.bi_wkv_backward(dy, k, v, w, u, order, y, log_den)]
    dk, dv = _outputs(k, order, k.shape, k.shape)
    if backend == "cuda":
        parts *= cuda.bi_plan(k, k.shape[1] if order is None else order.shape[-1])[2]
    dw, du = (k.new_empty(parts, k.shape[2]) for _ in range(2))
    (dy, k, v, y, log_den), order = _kernel_inputs((dy, k, v, y, log_den), order)
    w, u = w.contiguous(), u.contiguous()
    kernel = cuda.bi_backward if backend == "cuda" else torch.ops.linzoo_cpu.bi_wkv_backward
    kernel(dy, k, v, w, u, order, y, log_den, dk, dv, dw, du)
    return [dk, dv, dw.sum(0), du.sum(0)]


@torch.library.register_fake("linzoo::bi_wkv_backward")
def _bi_wkv_backward_fake(dy, k, v, w, u, order, y, log_den):
    return [x.new_empty(x.shape) for x in (k, v, w, u)]


def _bi_wkv_context(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _bi_wkv_autograd(ctx, dy, _):
    return *torch.ops.linzoo.bi_wkv_backward(dy, *ctx.saved_tensors), None, None


torch.library.impl("linzoo::bi_wkv", "default", _bi_wkv)
torch.library.impl("linzoo::bi_wkv_backward", "default", _bi_wkv_backward)
torch.library.register_autograd("linzoo::bi_wkv", _bi_wkv_autograd, setup_context=_bi_wkv_context)


@register_flop_formula(torch.ops.linzoo.bi_wkv)
def _bi_wkv_flops(k, v, w, u, order, *args, out_shape=None, **kwargs):
    """13 per step and channel: the count of the paper (eq. 8)."""
    return 13 * k[0] * (k[1] if order is None else order[-1]) * k[2]


@register_flop_formula(torch.ops.linzoo.bi_wkv_backward)
def _bi_wkv_backward_flops(dy, *inputs, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * _bi_wkv_flops(*inputs)


# --- registration of wkv6 and wkv7 ----------------------------------------------------------------------------------
# They return their output and, if `save`, the states before each chunk of CHUNK steps, from which the backward pass
# recomputes the others; without them it runs the forward pass again. One kernel serves both.

torch.library.define(
    "linzoo::wkv6",
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, bool bidirectional, bool save) "
    "-> (Tensor y, Tensor states)",
)
torch.library.define(
    "linzoo::wkv6_backward",
    "(Tensor dy, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, bool bidirectional, "
    "Tensor states) -> Tensor[]",
)
torch.library.define(
    "linzoo::wkv7",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? order, bool save) "
    "-> (Tensor y, Tensor states)",
)
torch.library.define(
    "linzoo::wkv7_backward",
    "(Tensor dy, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? order, Tensor states) -> Tensor[]",
)


def _states_shape(k, v, order, directions, save):
    steps = k.shape[1] if order is None else order.shape[-1]
    chunk = CHUNK.get(k.device.type, 1)
    chunks = (steps + chunk - 1) // chunk
    return (directions, k.shape[0], k.shape[2], chunks, k.shape[3], v.shape[3]) if save else (0,)


def _stored(states, k, save):
    """The states that a kernel would have stored, of one list entry ``(B, T, H, N, P)`` per direction."""
    chunk = CHUNK.get(k.device.type, 1)
    return torch.stack([s[:, ::chunk].transpose(1, 2) for s in states]) if save else k.new_empty(0)


def _resolve(k, v):
    """As `resolve`; the CUDA kernels hold a column of the state per thread."""
    backend, widest = resolve("wkv", k.device), max(k.shape[3], v.shape[3])
    if backend == "cuda" and widest > cuda.MAX_CHANNELS:
        reason = f"the CUDA kernel takes heads of at most {cuda.MAX_CHANNELS} channels, got {widest}"
        return fall_back("wkv", reason)
    return backend


def _run_forward(backend, r, w, k, v, a, b, u, order, directions, save):
    present = [x for x in (r, w, k, v, a, b) if x is not None]
    kernel = cuda.forward if backend == "cuda" else torch.ops.linzoo_cpu.wkv_forward
    parts = (directions,) if backend == "cuda" else ()  # a direction writes its own part of the sum
    (y,) = _outputs(v, order, (*parts, *v.shape))
    states = k.new_empty(_states_shape(k, v, order, directions, save))
    (r, w, k, v, *ab), order = _kernel_inputs(present, order)
    u = None if u is None else u.contiguous()
    kernel(r, w, k, v, *(ab or (None, None)), u, order, directions, y, states)
    return y.sum(0) if backend == "cuda" else y, states


def _run_backward(backend, dy, r, w, k, v, a, b, u, order, directions, states):
    """Gradients of r, w, k, v, a, b and u; empty ones for those that are None."""
    present = [x for x in (r, w, k, v, a, b) if x is not None]
    parts = (directions,) if backend == "cuda" else ()
    grads = _outputs(k, order, *((*parts, *x.shape) for x in present))
    grads += [k.new_empty(*parts, 0) for _ in range(6 - len(grads))]
    du = k.new_empty(*parts, 0) if u is None else k.new_zeros(*parts, k.shape[0], *u.shape)
    (dy, r, w, k, v, *ab), order = _kernel_inputs((dy, *present), order)
    u = None if u is None else u.contiguous()
    kernel = cuda.backward if backend == "cuda" else torch.ops.linzoo_cpu.wkv_backward
    kernel(dy, r, w, k, v, *(ab or (None, None)), u, order, directions, states, *grads, du)
    if backend == "cuda":
        *grads, du = (x.sum(0) for x in (*grads, du))
    return [*grads, du.sum(0)]


def _wkv6(r, k, v, w, u, order, bidirectional, save):
    _check_order(order, k.shape[1])
    backend = _resolve(k, v)
    if backend == "reference":
        y, states = reference.wkv6(r, k, v, w, u, order, bidirectional)
        return y.contiguous(), _stored(states, k, save).contiguous()
    return _run_forward(backend, r, w, k, v, None, None, u, order, 1 + bidirectional, save)


@torch.library.register_fake("linzoo::wkv6")
def _wkv6_fake(r, k, v, w, u, order, bidirectional, save):
    return v.new_empty(v.shape), k.new_empty(_states_shape(k, v, order, 1 + bidirectional, save))


def _wkv6_backward(dy, r, k, v, w, u, order, bidirectional, states):
    backend = _resolve(k, v)
    if backend == "reference":
        return [g.contiguous() for g in reference.wkv6_backward(dy, r, k, v, w, u, order, bidirectional)]
    if states.dim() == 1:
        states = _wkv6(r, k, v, w, u, order, bidirectional, True)[1]
    grads = _run_backward(backend, dy, r, w, k, v, None, None, u, order, 1 + bidirectional, states)
    dr, dw, dk, dv, _, _, du = grads
    return [dr, dk, dv, dw, du]


@torch.library.register_fake("linzoo::wkv6_backward")
def _wkv6_backward_fake(dy, r, k, v, w, u, order, bidirectional, states):
    return [x.new_empty(x.shape) for x in (r, k, v, w, u)]


def _wkv6_context(ctx, inputs, output):
    *tensors, ctx.bidirectional, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _wkv6_autograd(ctx, dy, _):
    *tensors, states = ctx.saved_tensors
    return *torch.ops.linzoo.wkv6_backward(dy, *tensors, ctx.bidirectional, states), None, None, None


def _wkv7(r, w, k, v, a, b, order, save):
    _check_order(order, k.shape[1])
    backend = _resolve(k, v)
    if backend == "reference":
        y, states = reference.wkv7(r, w, k, v, a, b, order)
        return y.contiguous(), _stored([states], k, save).contiguous()
    return _run_forward(backend, r, w, k, v, a, b, None, order, 1, save)


@torch.library.register_fake("linzoo::wkv7")
def _wkv7_fake(r, w, k, v, a, b, order, save):
    return v.new_empty(v.shape), k.new_empty(_states_shape(k, v, order, 1, save))


def _wkv7_backward(dy, r, w, k, v, a, b, order, states):
    backend = _resolve(k, v)
    if backend == "reference":
        return [g.contiguous() for g in reference.wkv7_backward(dy, r, w, k, v, a, b, order)]
    if states.dim() == 1:
        states = _wkv7(r, w, k, v, a, b, order, True)[1]
    return _run_backward(backend, dy, r, w, k, v, a, b, None, order, 1, states)[:6]


@torch.library.register_fake("linzoo::wkv7_backward")
def _wkv7_backward_fake(dy, r, w, k, v, a, b, order, states):
    return [x.new_empty(x.shape) for x in (r, w, k, v, a, b)]


def _wkv7_context(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _wkv7_autograd(ctx, dy, _):
    return *torch.ops.linzoo.wkv7_backward(dy, *ctx.saved_tensors), None, None


torch.library.impl("linzoo::wkv6", "default", _wkv6)
torch.library.impl("linzoo::wkv6_backward", "default", _wkv6_backward)
torch.library.register_autograd("linzoo::wkv6", _wkv6_autograd, setup_context=_wkv6_context)
torch.library.impl("linzoo::wkv7", "default", _wkv7)
torch.library.impl("linzoo::wkv7_backward", "default", _wkv7_backward)
torch.library.register_autograd("linzoo::wkv7", _wkv7_autograd, setup_context=_wkv7_context)


def _products(k, v, order):
    """Steps times key channels times value channels, over batch and heads."""
    return k[0] * (k[1] if order is None else order[-1]) * k[2] * k[3] * v[3]


@register_flop_formula(torch.ops.linzoo.wkv6)
def _wkv6_flops(r, k, v, w, u, order, bidirectional, *args, out_shape=None, **kwargs):
    """7 N P per step and head for both directions, as Vision-RWKV's script counts: 3 (decay, write, read) for each, 1
    for the token itself."""
    return (1 + 3 * (1 + bidirectional)) * _products(k, v, order)


@register_flop_formula(torch.ops.linzoo.wkv6_backward)
def _wkv6_backward_flops(dy, *inputs, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * _wkv6_flops(*inputs)


@register_flop_formula(torch.ops.linzoo.wkv7)
def _wkv7_flops(r, w, k, v, a, b, order, *args, out_shape=None, **kwargs):
    """5 N P per step and head: decay, what `a` reads, what `b` writes, what k writes, what r reads."""
    return 5 * _products(k, v, order)


@register_flop_formula(torch.ops.linzoo.wkv7_backward)
def _wkv7_backward_flops(dy, *inputs, out_shape=None, **kwargs):
    """Twice the forward pass, as for a matrix product."""
    return 2 * _wkv7_flops(*inputs)
