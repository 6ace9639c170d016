"""State-space duality (SSD): Mamba-2's scan with one decay per head, and its non-causal form, as matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import forced_backend
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

    computed chunk by chunk: masked attention within a chunk, final states between chunks.

    Args:
        x: ``(B, L, H, P)``: H heads of P channels. float64, float32, bfloat16 or float16.
        dt: Positive steps ``(B, L, H)``.
        A: Negative rates ``(H,)``.
        B, C: ``(B, L, G, N)``, each group shared by H / G successive heads.
        D: Skip weights ``(H,)``, None for no skip.
        chunk_size: Steps in a chunk. It does not change the result.

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

    length, dtype = x.shape[1], state_dtype(x.dtype)
    pad = -length % chunk_size  # steps with dt 0, which leave the state as it is

    def chunks(t, heads):  # (B, G, heads of a group, chunks, steps, ...)
        t = F.pad(t.to(dtype), (0, 0) * (t.dim() - 2) + (0, pad))
        return t.unflatten(1, (-1, chunk_size)).unflatten(3, (sizes["G"], heads)).movedim((3, 4), (1, 2))

    heads = sizes["H"] // sizes["G"]
    u, log_decay = chunks(x.to(dtype) * dt.to(dtype).unsqueeze(-1), heads), chunks(dt.to(dtype) * A.to(dtype), heads)
    B, C = chunks(B, 1), chunks(C, 1)

    # (..., l, s): the decay from step s to step l, summed separately for each pair. Differences of running sums would
    # lose the digits of A's gradient.
    since = log_decay.unsqueeze(-1).expand(*log_decay.shape, chunk_size).tril(-1).cumsum(-2).exp().tril()
    y = (C @ B.mT * since) @ u

    final = (B * since[..., -1, :].unsqueeze(-1)).mT @ u  # (B, G, h, c, N, P)
    total = log_decay.cumsum(-1).exp().unsqueeze(-1)
    state, before = torch.zeros_like(final[:, :, :, 0]), []
    if initial is not None:
        state = initial.to(dtype).mT.unflatten(1, (sizes["G"], heads))
    for decay, written in zip(total[..., -1:, :].unbind(3), final.unbind(3), strict=True):
        before.append(state)
        state = torch.addcmul(written, decay, state)
    y = torch.addcmul(y, total, C @ torch.stack(before, 3))
    y = y.movedim((1, 2), (3, 4)).flatten(3, 4).flatten(1, 2)[:, :length]
    y = y if D is None else y + D.to(dtype)[:, None] * x.to(dtype)
    return y.to(x.dtype), state.flatten(1, 2).mT


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
