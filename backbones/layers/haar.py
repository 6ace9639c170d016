"""One level of the orthonormal Haar wavelet transform, along one axis."""

import torch
from torch import Tensor


def haar(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal Haar transform along `dim` (counted from the end): the low and the high band."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    return (even + odd) * 0.5**0.5, (even - odd) * 0.5**0.5


def inverse_haar(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The inverse of `haar`."""
    return torch.stack([low + high, low - high], dim).flatten(dim - 1, dim) * 0.5**0.5
