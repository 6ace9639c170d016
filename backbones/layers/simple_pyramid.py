"""Maps at strides 4, 8, 16 and 32 from maps of any strides: the simple pyramid of ViTDet (arXiv 2203.16527)."""

import math

from timm.layers import LayerNorm2d
from torch import nn

STRIDES = (4, 8, 16, 32)


def rescale(dim, old, new, device=None, dtype=None):
    """A module that rescales maps ``(B, dim, H, W)`` from stride `old` to stride `new`.

    Upsampling uses transposed 2x2 convolutions, with norm and GELU between two of them; downsampling uses max pooling.

    Raises:
        ValueError: one stride is not the other times a power of two.
    """
    dd: dict = {"device": device, "dtype": dtype}
    steps = math.log2(old / new)
    if not steps.is_integer():
        raise ValueError(f"stride: expected {new} times a power of two, got {old}")
    if steps < 0:
        return nn.MaxPool2d(new // old, ceil_mode=True)
    layers = []
    for _ in range(int(steps)):
        layers += [LayerNorm2d(dim, **dd), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(dim, dim, 2, 2, **dd))
    return nn.Sequential(*layers) if layers else nn.Identity()
