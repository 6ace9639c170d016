"""Gated delta rule: a matrix memory that corrects what it holds under a key, as matrix products."""

import torch
from torch import Tensor

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

    computed chunk by chunk in the WY form: within a chunk the corrections of all steps solve one triangular system,
    between chunks the states are carried. There is no kernel; the same matrix products serve every device. Clips are
    streamed by passing the last state of one as the first of the next.

    Args:
        q, k: Queries and keys ``(B, L, H, K)``: H heads. Keys have length 1 at most where beta is 1, else states may
            grow. float64, float32, bfloat16 or float16.
        v: Values ``(B, L, H, P)``.
        g: Logarithms of the decays ``(B, L, H)``, mostly negative.
        beta: How much of the value under a key is replaced ``(B, L, H)``, mostly in (0, 1).
        initial: The state in front of the first step ``(B, H, K, P)``; None for 0.
        chunk_size: Steps in a chunk: any gives the same result.

    Returns:
        y ``(B, L, H, P)`` in the widest dtype of `q`, `k` and `v`, and the last state ``(B, H, K, P)``; states and sums
        are float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, L is 0, `chunk_size` is not positive, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(q=(q, "BLHK"), k=(k, "BLHK"), v=(v, "BLHP"), g=(g, "BLH"), beta=(beta, "BLH"), initial=(initial, "BHKP"))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype = promote(q, k, v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    g, beta = (x.to(state_dtype(dtype)) for x in (g, beta))
    initial = None if initial is None else initial.to(state_dtype(dtype))
    if forced_backend() == "reference":
        packed = reference.gated_delta(q, k, v, g, beta, initial)
    else:
        packed = _operator(q, k, v, g, beta, initial, chunk_size)
    y, state = packed.split([v.shape[1], k.shape[3]], 1)
    return y.to(dtype), state.transpose(1, 2)


# Results and states are one tensor here, (B, L + K, H, P): an operator has one result that is differentiated.


def _chunked(q, k, v, g, beta, initial, chunk_size):
    with torch.autocast(q.device.type, enabled=False):  # the states stay in float32
        return reference.chunked(q, k, v, g, beta, initial, chunk_size)


def _export(q, k, v, g, beta, initial, chunk_size):
    return reference.gated_delta(q, k, v, g, beta, initial, use_scan=True)


def _fake(q, k, v, *_):
    batch, length, heads, width = v.shape
    return v.new_empty(batch, length + k.shape[3], heads, width, dtype=state_dtype(q.dtype))


def _flops(q, v, chunk_size, **_):
    """A multiply-add for each product: with the steps of a chunk, and with the state, written, read and corrected."""
    batch, length, heads, width = q
    chunk = min(chunk_size, length)
    return batch * length * heads * (chunk * (3 * width + 2 * v[3]) + 3 * width * v[3])


_operator = Operator(
    "gated_delta",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, int chunk_size) -> Tensor packed",
    kernel=None,
    reference=_chunked,
    export=_export,
    fake=_fake,
    flops=_flops,
)
