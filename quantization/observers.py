"""What calibration records: ranges of tensors, and maxima and covariances of channels."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .fake import Quantizer, Range

__all__ = ["BestRangeObserver", "ChannelObserver", "MinMaxObserver", "Observer", "PercentileObserver", "best_range"]


class Observer(Protocol):
    """Sees tensors one after another, and returns the range they need at the end."""

    def see(self, x: Tensor) -> None: ...

    def range(self) -> Range: ...


class MinMaxObserver:
    """The smallest and the largest value of all tensors, for each scale of `quantizer`."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer = quantizer
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def see(self, x: Tensor) -> None:
        low, high = self.quantizer.range(x.detach())
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> Range:
        """Raises ValueError if nothing was seen."""
        if self.low is None or self.high is None:
            raise ValueError("range: expected tensors to have been seen, got none")
        return self.low, self.high


class PercentileObserver:
    """Quantiles of all values seen, from a histogram whose bins double in width when larger values come.

    Args:
        share: Share of the values that the range includes at either end.
        bins: Number of histogram bins, even; they lie symmetrically around 0.
    """

    def __init__(self, share: float = 0.999999, bins: int = 2048):
        if not 0.5 < share <= 1:
            raise ValueError(f"share: expected more than 0.5 and at most 1, got {share}")
        if bins % 4:
            raise ValueError(f"bins: expected a multiple of 4, got {bins}")
        self.share, self.bins = share, bins
        self.reach = 0.0
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        x = x.detach().float().cpu()
        largest = float(x.abs().max())
        if not self.reach:
            self.reach = largest or 1.0
        while largest > self.reach:
            quarter = torch.zeros(self.bins // 4, dtype=torch.float64)
            self.counts = torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter])
            self.reach *= 2
        self.counts += torch.histc(x, self.bins, -self.reach, self.reach)

    def range(self) -> Range:
        """Edges of the bins that hold the quantiles; raises ValueError if nothing was seen."""
        return self.quantiles(self.share)

    def quantiles(self, share: float) -> Range:
        """`range` for another share."""
        total = self.counts.sum()
        if not total:
            raise ValueError("range: expected tensors to have been seen, got none")
        edges = torch.linspace(-self.reach, self.reach, self.bins + 1)
        sums = self.counts.cumsum(0)
        high = int(torch.searchsorted(sums, share * total).clamp(max=self.bins - 1))
        low = int(torch.searchsorted(sums, (1 - share) * total, right=True).clamp(max=self.bins - 1))
        return edges[low], edges[high + 1]


SHARES = (0.999, 0.9999, 0.99999)  # RepQ-ViT's quantiles


class BestRangeObserver(PercentileObserver):
    """`best_range` of all values seen, from a histogram.

    Args:
        quantizer: Rounds the values; called with a range.
        shares: Quantiles to choose from.
        bins: As in `PercentileObserver`.
    """

    def __init__(
        self, quantizer: Callable[[Tensor, Range], Tensor], shares: Sequence[float] = SHARES, bins: int = 8192
    ):
        super().__init__(max(shares), bins)
        self.quantizer, self.shares = quantizer, shares

    def range(self) -> Range:
        """The quantiles with the smallest squared rounding error; raises ValueError if nothing was seen."""
        edges = torch.linspace(-self.reach, self.reach, self.bins + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        used = self.counts > 0

        def error(range: Range) -> float:
            return float((self.counts * (self.quantizer(centres, range) - centres).square())[used].sum())

        return min((self.quantiles(share) for share in self.shares), key=error)


class ChannelObserver:
    """Maxima of the last axis's channels, and on demand their covariance; separately for each group, if there are any.

    Args:
        groups: Whether the axis before the last one is kept, as groups with their own channels.
        covariance: Whether second moments are summed.
    """

    def __init__(self, groups: bool = False, covariance: bool = False):
        self.groups, self.covariant = groups, covariance
        self.largest: Tensor | None = None
        self.products: Tensor | None = None
        self.sums: Tensor | float = 0.0
        self.count = 0

    def see(self, x: Tensor) -> None:
        x = x.detach().double()
        rows = x.flatten(0, -3).transpose(0, 1) if self.groups else x.flatten(0, -2)  # (G, M, n) or (M, n)
        largest = rows.abs().amax(-2)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.covariant:
            products, sums = rows.mT @ rows, rows.sum(-2)
            self.products = products if self.products is None else self.products + products
            self.sums = self.sums + sums
            self.count += rows.shape[-2]

    def maxima(self) -> Tensor:
        """``(n,)`` or ``(G, n)``, float64; raises ValueError if nothing was seen."""
        if self.largest is None:
            raise ValueError("maxima: expected tensors to have been seen, got none")
        return self.largest

    def second_moments(self) -> Tensor:
        """``E[x^T x]``, of the shape of `covariance`; raises ValueError as that does."""
        if self.products is None:
            raise ValueError("covariance: expected an observer with covariance=True that saw tensors")
        return self.products / self.count

    def covariance(self) -> Tensor:
        """``(n, n)`` or ``(G, n, n)``, float64; raises ValueError if it was not requested or nothing was seen."""
        moments, mean = self.second_moments(), torch.as_tensor(self.sums) / self.count
        return moments - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def best_range(x: Tensor, quantizer: Quantizer, shares: Sequence[float] = SHARES) -> Range:
    """The quantiles ``(1 - q, q)`` of `x` with the smallest squared rounding error (RepQ-ViT, arXiv 2212.08254).

    Args:
        x: A calibration tensor with one scale.
        shares: Values of q to choose from.
    """
    values = x.flatten().sort().values
    last = values.numel() - 1
    ranges = [(values[round((1 - q) * last)], values[round(q * last)]) for q in shares]
    return min(ranges, key=lambda range: float((quantizer(x, range) - x).square().mean()))
