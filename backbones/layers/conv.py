"""Convolutions of channel-last maps."""

from torch import nn


class Conv2dNHWC(nn.Conv2d):
    """Convolution of a channel-last map ``(B, H, W, C)``: the same memory, viewed as NCHW."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 and a LayerNorm: half the size, rounded up; ``(B, H, W, C)``."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = Conv2dNHWC(dim, dim_out, 3, 2, padding=1, **dd)
        self.norm = nn.LayerNorm(dim_out, eps=1e-5, **dd)

    def forward(self, x):
        return self.norm(self.conv(x))
