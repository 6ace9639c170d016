"""Gated delta rule: a matrix memory that corrects the value it holds under a key."""

import torch
from torch import Tensor

from .. import matrix_scan
from ..backend import forced_backend
from ..operator import Operator
from ..tensors import check, promote, state_dtype
from . import reference

__all__ = ["gated_delta"]


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial: Tensor | None = None,
    *,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule (arXiv 2412.06464, section 3): a memory S in R^(K x P) for each batch item and head::

        S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - exp(g_t) S_{t-1}^T k_t)^T
        y_t = S_t^T q_t

    On the CPU a kernel goes step by step. Elsewhere it is computed chunk by chunk in the WY form, as matrix products:
    in a chunk one triangular system gives the corrections of all steps; states are carried between chunks.
    To stream a clip, pass the last state of one part as the initial state of the next.

    Args:
        q, k: Queries and keys ``(B, L, H, K)``: H heads. Where beta is 1, keys must have length 1 at most, else states
            may grow. float64, float32, bfloat16 or float16.
        v: Values ``(B, L, H, P)``.
        g: Logarithms of the decays ``(B, L, H)``, mostly negative.
        beta: How much of the value under a key is replaced ``(B, L, H)``, mostly in (0, 1).
        initial: The state before the first step ``(B, H, K, P)``; None for 0.
        chunk_size: Steps in a chunk of the WY form. It does not change the result.

    Returns:
        y ``(B, L, H, P)`` in the widest dtype of `q`, `k` and `v`, and the last state ``(B, H, K, P)``. States and sums
        are float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, L is 0, `chunk_size` is not positive, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(q=(q, "BLHK"), k=(k, "BLHK"), v=(v, "BLHP"), g=(g, "BLH"), beta=(beta, "BLH"), initial=(initial, "BHKP"))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype = promote(q, k, v)
    q, k, v, g, beta = (x.to(state_dtype(dtype)) for x in (q, k, v, g, beta))
    initial = None if initial is None else initial.to(state_dtype(dtype))
    if forced_backend() == "reference":
        packed = reference.gated_delta(q, k, v, g, beta, initial)
    else:
        packed = _operator(q, k, v, g, beta, initial, chunk_size)
    y, state = packed.split([v.shape[1], k.shape[3]], 1)
    return y.to(dtype), state.transpose(1, 2)


# The first result holds output and last state, the second the states that the kernel's backward pass starts from (see
# `matrix_scan.empty`). The WY form needs none.


def _chunked(q, k, v, g, beta, initial, chunk_size, save):
    with torch.autocast(q.device.type, enabled=False):  # the states stay in float32
        packed = reference.chunked(q, k, v, g, beta, initial, chunk_size)
    return packed, matrix_scan.empty(k, v, save)[1]


def _export(q, k, v, g, beta, initial, chunk_size, save):
    return reference.gated_delta(q, k, v, g, beta, initial, use_scan=True), matrix_scan.empty(k, v, save)[1]


def _empty(q, k, v, g, beta, initial, chunk_size, save):
    return matrix_scan.empty(k, v, save)


def _forward(backend, q, k, v, g, beta, initial, chunk_size, save):
    return matrix_scan.forward("gated_delta", save, q=q, k=k, v=v, g=g, beta=beta, initial=initial)


def _backward(backend, dpacked, q, k, v, g, beta, initial, chunk_size, states):
    return matrix_scan.backward("gated_delta", dpacked, states, q=q, k=k, v=v, g=g, beta=beta, initial=initial)


def _flops(q, v, chunk_size, **_):
    """A multiply-add per product: with the steps of a chunk, and with the state when it is written, read, corrected."""
    batch, length, heads, width = q
    chunk = min(chunk_size, length)
    return batch * length * heads * (chunk * (3 * width + 2 * v[3]) + 3 * width * v[3])


_operator = Operator(
    "gated_delta",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, int chunk_size, bool save) "
    "-> (Tensor packed, Tensor states)",
    kernel="gated_delta",
    devices=("cpu",),
    reference=_chunked,
    export=_export,
    forward=_forward,
    backward=_backward,
    fake=_empty,
    flops=_flops,
)
