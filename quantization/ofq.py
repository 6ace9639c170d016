"""Training with rounded weights that do not oscillate (OFQ, arXiv 2302.02210): StatsQ, and which weights to freeze.

OFQ's reparametrisation of query and key is not implemented.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["StatsQ", "quantize_weights", "settle_weights"]


class StatsQ(nn.Module):
    """Rounds each row of a weight ``(..., in)`` to 2^bits levels, none of them 0, by its mean size (no learnt scale).

    With n = 2^(bits - 1) and alpha = 2 mean|w| of a row::

        w' = clip(w / alpha, -1, 1 - 1e-6);    alpha (round(n w' - 1/2) + 1/2) / n

    The gradient passes to w unchanged.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {bits}")
        self.levels = 2 ** (bits - 1)

    def position(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``n w'``, with rounding boundaries at the integers, and alpha."""
        alpha = (2 * weight.abs().mean(-1, keepdim=True)).clamp(min=torch.finfo(weight.dtype).tiny)
        return self.levels * (weight / alpha).clamp(-1, 1 - 1e-6), alpha

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            place, alpha = self.position(weight)
            rounded = alpha * (((place - 0.5).round() + 0.5) / self.levels)
        return weight - weight.detach() + rounded

    @torch.no_grad()
    def settled(self, weight: Tensor, boundary: float) -> Tensor:
        """Whether each weight is further than `boundary` from the nearest rounding boundary, in steps."""
        place, _ = self.position(weight)
        return (place - place.round()).abs() > boundary


def quantize_weights(modules: Iterable[nn.Module], bits: int) -> None:
    """Train the `weight` of each module rounded by `StatsQ`; ValueError if it does not support `bits`."""
    for module in modules:
        parametrize.register_parametrization(module, "weight", StatsQ(bits))


def settle_weights(model: nn.Module) -> None:
    """Replace the trained weights by the rounded ones: a plain model again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], StatsQ):
            parametrize.remove_parametrizations(module, "weight")
