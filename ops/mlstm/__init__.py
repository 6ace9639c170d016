"""mLSTM: the matrix memory of xLSTM, with exponential input gates and a normaliser, as matrix products."""

import torch
from torch import Tensor

from ..backend import forced_backend
from ..operator import Operator
from ..tensors import check, promote, state_dtype
from . import reference

__all__ = ["mlstm"]

EPS = 1e-6


def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, chunk_size: int = 64) -> Tensor:
    """mLSTM (xLSTM, arXiv 2405.04517, section 2.3): a matrix memory for each head, its gates in the log domain.

    For each batch item and head, with the key k_t / sqrt(P), and m_0 = -inf, C_0 = 0, n_0 = 0::

        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
        C_t = exp(log sigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T,     in R^(P x P)
        n_t = the same, with k_t in the place of k_t v_t^T
        h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)

    computed chunk by chunk: within a chunk as masked attention, between chunks by their states. There is no kernel; the
    same matrix products serve every device.

    Args:
        q, k, v: ``(B, L, H, P)``: H heads of P channels. float64, float32, bfloat16 or float16.
        i, f: Gates before exp and sigmoid ``(B, L, H)``.
        chunk_size: Steps in a chunk: any gives the same result.

    Returns:
        ``(B, L, H, P)`` in the dtype of the activations, promoted to the widest of `q`, `k` and `v`; states and sums
        are float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, L is 0, `chunk_size` is not positive, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(q=(q, "BLHP"), k=(k, "BLHP"), v=(v, "BLHP"), i=(i, "BLH"), f=(f, "BLH"))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    dtype = promote(q, k, v)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    i, f = (x.to(state_dtype(dtype)) for x in (i, f))
    if forced_backend() == "reference":
        return reference.mlstm(q, k, v, i, f, EPS)
    return _operator(q, k, v, i, f, chunk_size)


def _chunked(q, k, v, i, f, chunk_size):
    with torch.autocast(q.device.type, enabled=False):  # the states stay in float32
        return reference.chunked(q, k, v, i, f, EPS, chunk_size)


def _export(q, k, v, i, f, chunk_size):
    return reference.mlstm(q, k, v, i, f, EPS, use_scan=True)


def _flops(q, chunk_size, **_):
    """A multiply-add for each product: with all steps of a chunk, and with the state, written and read."""
    batch, length, heads, width = q
    chunk = min(chunk_size, length)
    return batch * length * heads * (chunk * (2 * width + 1) + 2 * width * (width + 1))


_operator = Operator(
    "mlstm",
    "(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, int chunk_size) -> Tensor h",
    kernel=None,
    reference=_chunked,
    export=_export,
    fake=lambda q, *_: q.new_empty(q.shape),
    flops=_flops,
)
