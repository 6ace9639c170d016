"""State-space duality (SSD): Mamba-2's scan with one decay per head, and its non-causal form, as matrix products."""

import torch
from torch import Tensor

from .. import matrix_scan
from ..backend import forced_backend
from ..operator import Operator
from ..tensors import check, state_dtype
from . import reference

__all__ = ["nc_ssd", "ssd", "ssd_state"]


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, chunk_size: int = 64
) -> Tensor:
    """Causal state-space duality (Mamba-2, arXiv 2405.21060, section 6): a matrix state per head, with a scalar decay.

    For each head h of group g::

        S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T,     S_0 = 0, in R^(N x P)
        y_t = S_t^T C_t + D x_t

    On the CPU a kernel goes step by step. Elsewhere it is computed chunk by chunk, as matrix products: masked
    attention within a chunk, final states between chunks.

    Args:
        x: ``(B, L, H, P)``: H heads of P channels. float64, float32, bfloat16 or float16.
        dt: Positive steps ``(B, L, H)``.
        A: Negative rates ``(H,)``.
        B, C: ``(B, L, G, N)``, each group shared by H / G successive heads.
        D: Skip weights ``(H,)``, None for no skip.
        chunk_size: Steps in a chunk of the matrix products. It does not change the result.

    Returns:
        ``(B, L, H, P)`` in the dtype of `x`; states and sums are float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, `chunk_size` is not positive, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    return ssd_state(x, dt, A, B, C, D, chunk_size=chunk_size)[0]


def ssd_state(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """`ssd` with an initial and a final state: cut a sequence, and continue each part from the last state.

    Args:
        x, dt, A, B, C, D, chunk_size: As in `ssd`.
        initial: S_0 with values before keys ``(batch, H, P, N)``; None for 0.

    Returns:
        y ``(B, L, H, P)``, and the state after the last step ``(batch, H, P, N)`` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: As in `ssd`.
    """
    axes = dict(x=(x, "BLHP"), dt=(dt, "BLH"), A=(A, "H"), B=(B, "BLGN"), C=(C, "BLGN"), D=(D, "H"))
    sizes = check(**axes, initial=(initial, "BHPN"))
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"B: the number of heads, {sizes['H']}, must be a multiple of its groups, got {sizes['G']}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if forced_backend() == "reference":
        return reference.ssd_state(x, dt, A, B, C, D, initial)

    dtype = state_dtype(x.dtype)
    x_, dt, B, C = (t.to(dtype) for t in (x, dt, B, C))
    run = _operator if x.device.type == "cpu" else reference.chunked
    packed = run(C, B, x_, dt * A.to(dtype), dt, None if initial is None else initial.to(dtype).mT, chunk_size)
    y, state = packed.split([sizes["L"], sizes["N"]], 1)
    y = y if D is None else torch.addcmul(y, x_, D.to(dtype)[:, None])
    return y.to(x.dtype), state.permute(0, 2, 3, 1)


# The first result holds output and last state, the second the states that the kernel's backward pass starts from (see
# `matrix_scan.empty`).


def _empty(C, B, x, g, dt, initial, chunk_size, save):
    return matrix_scan.empty(B, x, save)


def _reference(C, B, x, g, dt, initial, chunk_size, save):
    with torch.autocast(x.device.type, enabled=False):  # the states stay in float32
        packed = reference.chunked(C, B, x, g, dt, initial, chunk_size)
    return packed, matrix_scan.empty(B, x, save)[1]


def _by_head(C, B, x, g, dt, initial):
    q, k = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (C, B))
    return dict(q=q, k=k, v=x, g=g, beta=dt, initial=initial)


def _forward(backend, C, B, x, g, dt, initial, chunk_size, save):
    return matrix_scan.forward("ssd", save, **_by_head(C, B, x, g, dt, initial))


def _backward(backend, dpacked, C, B, x, g, dt, initial, chunk_size, states):
    dC, dB, *rest = matrix_scan.backward("ssd", dpacked, states, **_by_head(C, B, x, g, dt, initial))
    return [*(t.unflatten(2, (B.shape[2], -1)).sum(3) for t in (dC, dB)), *rest]


def _flops(C, x, chunk_size, **_):
    """A multiply-add per product: with the steps of a chunk, and with the state when it is written and read."""
    (batch, length, groups, keys), (*_, heads, values) = C, x
    chunk = min(chunk_size, length)
    return batch * length * (chunk * (groups * keys + heads * values) + 2 * heads * keys * values)


_operator = Operator(
    "ssd",
    "(Tensor C, Tensor B, Tensor x, Tensor g, Tensor dt, Tensor? initial, int chunk_size, bool save) "
    "-> (Tensor packed, Tensor states)",
    kernel="ssd",
    devices=("cpu",),
    reference=_reference,
    forward=_forward,
    backward=_backward,
    fake=_empty,
    flops=_flops,
)


def nc_ssd(x: Tensor, weight: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """Non-causal state-space duality (VSSD, arXiv 2407.18559): all tokens write to one state that all of them read.

    ``S = sum_i weight_i B_i x_i^T`` per head, ``y_i = S^T C_i + D x_i``: no order, and no decay except the weights.

    Args:
        x: ``(B, L, H, P)``. float64, float32, bfloat16 or float16.
        weight: Weights of the tokens ``(B, L, H)``.
        B, C: ``(B, L, N)``, shared by the heads.
        D: Skip weights ``(H,)``, None for no skip.

    Returns:
        ``(B, L, H, P)`` in the dtype of `x`; the state, a sum over all tokens, is float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
    """
    check(x=(x, "BLHP"), weight=(weight, "BLH"), B=(B, "BLN"), C=(C, "BLN"), D=(D, "H"))
    if forced_backend() == "reference":
        return reference.nc_ssd(x, weight, B, C, D)
    dtype = state_dtype(x.dtype)
    x_ = x.to(dtype)
    weighted = (x_ * weight.to(dtype).unsqueeze(-1)).flatten(2)  # (B, L, H P)
    y = (C.to(dtype) @ (B.to(dtype).transpose(1, 2) @ weighted)).unflatten(2, x.shape[2:])
    return (y if D is None else torch.addcmul(y, x_, D.to(dtype)[:, None])).to(x.dtype)
