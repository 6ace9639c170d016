"""Simulated quantisers: tensors rounded to a grid of 2^bits values, in floating point.

``q = round(x / scale) + zero``, cut to the grid, and back: ``(q - zero) scale``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Granularity", "LogQuantizer", "Quantizer", "log_sqrt2"]

Granularity = Literal["tensor", "channel", "token", "group"]
Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Quantizer:
    """How a tensor is rounded.

    Args:
        bits: Bits of an integer, 2 to 16.
        symmetric: A grid around 0 without a zero point; otherwise (affine) from the smallest value to the largest.
        granularity: What has its own scale: the tensor, each index of `axis` ('channel'), each vector of the last
            axis ('token'), or every `group` values of the last axis.
        axis: The axis of 'channel'; several for one scale per combination of their indices.
        group: Values in a 'group'.

    Raises:
        ValueError: the bits or the granularity are not among these.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = "tensor"
    axis: int | tuple[int, ...] = 0
    group: int = 128

    def __post_init__(self):
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits: expected 2 to 16, got {self.bits}")
        if self.granularity not in ("tensor", "channel", "token", "group"):
            raise ValueError(f"granularity: expected tensor, channel, token or group, got {self.granularity!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        half = 2 ** (self.bits - 1)
        return (1 - half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def range(self, x: Tensor) -> Range:
        """The smallest and the largest value of all elements that share a scale, as tensors that broadcast over `x`.

        Raises:
            ValueError: groups do not divide the last axis.
        """
        if self.granularity == "group":
            if x.shape[-1] % self.group:
                raise ValueError(f"group: expected a divisor of {x.shape[-1]} channels, got {self.group}")
            low, high = x.unflatten(-1, (-1, self.group)).aminmax(dim=-1, keepdim=True)
            return low.expand(*low.shape[:-1], self.group).flatten(-2), high.expand(
                *high.shape[:-1], self.group
            ).flatten(-2)
        if self.granularity == "tensor":
            dims = tuple(range(x.dim()))
        elif self.granularity == "token":
            dims = (x.dim() - 1,)
        else:
            kept = {axis % x.dim() for axis in ((self.axis,) if isinstance(self.axis, int) else self.axis)}
            dims = tuple(dim for dim in range(x.dim()) if dim not in kept)
        return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)

    def parameters(self, low: Tensor, high: Tensor) -> Range:
        """Scale and zero point of a range; 0 always lies on the grid."""
        least, largest = self.grid
        tiny = torch.finfo(low.dtype).tiny
        if self.symmetric:
            scale = (torch.maximum(low.abs(), high.abs()) / largest).clamp(min=tiny)
            return scale, torch.zeros_like(scale)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (largest - least)).clamp(min=tiny)
        return scale, (least - low / scale).round()

    def __call__(self, x: Tensor, range: Range | None = None) -> Tensor:
        """`x` rounded to the grid, in its own shape and dtype.

        Args:
            x: Floating point.
            range: Smallest and largest value (static); None for those of `x` itself (dynamic).
        """
        scale, zero = self.parameters(*(self.range(x) if range is None else range))
        return ((x / scale + zero).round().clamp(*self.grid) - zero) * scale


def log_sqrt2(a: Tensor, delta: Tensor | float, bits: int = 8) -> Tensor:
    """RepQ-ViT's quantiser for softmax outputs (arXiv 2212.08254, section 3.3): powers of the square root of 2.

    ``k = round(-2 log2(a / delta))``; ``delta 2^(-k / 2)``, or 0 if k is beyond the last of 2^bits codes.

    Args:
        a: Non-negative.
        delta: The value of code 0.
    """
    k = (-2 * (a / delta).log2()).round().clamp(min=0)
    return torch.where(k < 2**bits, torch.exp2(-k / 2) * delta, 0.0)


@dataclass(frozen=True)
class LogQuantizer:
    """`log_sqrt2` with the largest value of a range as `delta`."""

    bits: int = 8

    def __call__(self, x: Tensor, range: Range) -> Tensor:
        return log_sqrt2(x, range[1].to(x), self.bits)
