"""Moves outliers from activations into weights (SmoothQuant's factors, as MambaQuant uses them)."""

import torch
from torch import Tensor, nn

from .invariances import Axis

__all__ = ["read_maxima", "smoothing"]


def read_maxima(model: nn.Module, axis: Axis) -> Tensor:
    """The largest absolute weight that reads each channel: ``(n,)``, or ``(G, n)`` if the axis is grouped."""
    found = []
    for slot in axis.slots:
        if slot.power > 0:
            part = model.get_parameter(slot.name).detach().narrow(slot.dim, slot.start, axis.size).double().abs()
            rows = part.movedim(slot.dim, -1)
            found.append(rows.flatten(1, -2).amax(1) if axis.grouped else rows.flatten(0, -2).amax(0))
    return torch.stack(found).amax(0)


def smoothing(activations: Tensor, weights: Tensor, alpha: float = 0.5, floor: float = 1e-2) -> Tensor:
    """``max|x|^alpha / max|w|^(1 - alpha)`` of each channel, at least `floor` (MambaQuant's S1 to S7).

    It is 1 if either is 0.

    Args:
        activations, weights: Largest absolute values, of one shape.
        alpha: How much of an outlier goes to the weights, 0 to 1.

    Raises:
        ValueError: `alpha` lies outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    used = (activations > 0) & (weights > 0)
    return torch.where(used, activations**alpha / weights ** (1 - alpha), 1.0).clamp(min=floor)
