"""Convolutions of channel-last maps."""

from torch import nn

from linzoo.ops import depthwise_conv2d


class Conv2dNHWC(nn.Conv2d):
    """Convolution of a channel-last map ``(B, H, W, C)``: the same memory, viewed as NCHW."""

    def forward(self, x):
        if self._is_wide_and_depthwise():
            weight = self.weight.squeeze(1)
            return depthwise_conv2d(x, weight, self.bias, padding=self.padding, dilation=self.dilation[0])
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _is_wide_and_depthwise(self):
        """Whether `depthwise_conv2d` has a faster backward pass."""
        if not self.groups == self.in_channels == self.out_channels or isinstance(self.padding, str):
            return False
        wide = max(self.kernel_size) > 3 or max(self.dilation) > 1
        return wide and max(self.stride) == 1 and len(set(self.dilation)) == 1 and self.padding_mode == "zeros"


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 and a LayerNorm: half the size, rounded up; ``(B, H, W, C)``."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = Conv2dNHWC(dim, dim_out, 3, 2, padding=1, **dd)
        self.norm = nn.LayerNorm(dim_out, eps=1e-5, **dd)

    def forward(self, x):
        return self.norm(self.conv(x))
