"""Frequency dynamic convolution (FDConv, CVPR 2025, arXiv 2503.18783)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class StarReLU(nn.Module):
    """``s relu(x)^2 + b`` with learned scalars."""

    def __init__(self, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return self.scale * F.relu(x).square() + self.bias


class FrequencyBands(nn.Module):
    """Frequency band modulation: ``x`` split into octaves, each weighted at every pixel; ``(B, C, H, W)``.

    As published, the masks are made on a 64 x 64 grid and resized to the map's spectrum by nearest neighbours, without
    shifting the origin. For other sizes they are only nearly the octaves.
    """

    CUTS = (2, 4, 8)  # a band ends at half the sampling rate over each of these

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        dd: dict = {"device": device, "dtype": dtype}
        self.weights = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1, **dd) for _ in self.CUTS)
        self.reset_parameters()

    def reset_parameters(self):
        for conv in self.weights:
            nn.init.normal_(conv.weight, std=1e-6)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        size, dtype = x.shape[-2:], torch.promote_types(x.dtype, torch.float32)
        rows, columns = torch.fft.fftfreq(64, device=x.device).abs(), torch.fft.rfftfreq(64, device=x.device).abs()
        radius = torch.maximum(rows[:, None], columns)
        spectrum = torch.fft.rfft2(x.to(dtype), norm="ortho")
        above, out = x.to(dtype), 0
        for cut, weight in zip(self.CUTS, self.weights, strict=True):
            mask = F.interpolate((radius < 0.5 / cut + 1e-8).to(dtype)[None, None], spectrum.shape[-2:])
            below = torch.fft.irfft2(spectrum * mask, s=size, norm="ortho")
            out = out + 2 * weight(x).sigmoid() * (above - below)
            above = below
        return (out + above).to(x.dtype)


class FDConv(nn.Module):
    """A convolution whose weight is made for each image from its channel means.

    The weight's spectrum is cut into `kernel_num` groups of equally many coefficients, from low to high frequency. An
    attention per group makes the image's weight. Further attentions scale it: per input channel, per output channel,
    per tap, and for each weight separately. With a kernel of 3, the input's frequency bands are modulated first.
    Initially it is nearly an ordinary convolution.

    Args:
        in_channels: Channels of ``(B, C, H, W)``, more than 16.
        out_channels: Channels of the output, more than 16.
        kernel_size: 1 or 3.
        stride, padding, bias: As in `torch.nn.Conv2d`.
        kernel_num: n, groups of frequencies; must divide the number of coefficients.
        reduction: Input channels over the attentions' inner width, which is at least 16.
        temperature: Divides the logits of the kernel attention.

    Raises:
        ValueError: a size is not supported; the published networks then use a plain convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        kernel_num: int = 64,
        reduction: int = 16,
        temperature: float = 1.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if kernel_size not in (1, 3) or min(in_channels, out_channels) <= 16:
            raise ValueError(
                "in_channels, out_channels, kernel_size: expected more than 16 channels and a kernel of 1 or 3, "
                f"got {in_channels}, {out_channels} and {kernel_size}; use torch.nn.Conv2d"
            )
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.kernel_num, self.temperature = stride, padding, kernel_num, temperature
        rows, columns = out_channels * kernel_size, in_channels * kernel_size
        coefficients = rows * (columns // 2 + 1)
        if columns % 2 or coefficients % kernel_num:
            raise ValueError(f"kernel_num: expected a divisor of {coefficients} coefficients, got {kernel_num}")
        hidden, taps = max(in_channels // reduction, 16), kernel_size**2
        self.dft_weight = nn.Parameter(torch.empty(rows, columns // 2 + 1, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.register_buffer("group", torch.empty(rows, columns // 2 + 1, dtype=torch.long, device=device), False)
        self.bands = FrequencyBands(in_channels, **dd) if kernel_size == 3 else None
        self.fc = nn.Conv2d(in_channels, hidden, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(hidden, **dd)
        self.act = StarReLU(**dd)
        self.channel_fc = nn.Conv2d(hidden, in_channels, 1, **dd)
        self.filter_fc = nn.Conv2d(hidden, out_channels, 1, **dd)
        self.spatial_fc = nn.Conv2d(hidden, taps, 1, **dd) if kernel_size > 1 else None
        self.kernel_fc = nn.Conv2d(hidden, kernel_num, 1, **dd)
        width = round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1
        self.local_norm = nn.LayerNorm(in_channels, **dd)
        self.local_conv = nn.Conv1d(1, out_channels * taps, width, padding=width // 2, bias=False, **dd)
        self.reset_parameters()

    @property
    def scale(self):
        """Half the smaller channel number. The spectrum is stored divided by it, so gradients are not too small."""
        return min(self.in_channels, self.out_channels) // 2

    @torch.no_grad()
    def reset_parameters(self):
        rows, columns = (n * self.kernel_size for n in (self.out_channels, self.in_channels))
        distance = torch.hypot(
            torch.fft.fftfreq(rows, device="cpu")[:, None], torch.fft.rfftfreq(columns, device="cpu")
        )
        order = distance.flatten().argsort(stable=True)
        group = torch.empty_like(order)
        group[order] = torch.arange(len(order), device="cpu") // (len(order) // self.kernel_num)
        self.group.copy_(group.view_as(self.group))
        weight = torch.empty(
            self.out_channels, self.in_channels, self.kernel_size, self.kernel_size, device=self.dft_weight.device
        )
        self.copy_weight(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for conv in (self.fc, self.filter_fc):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for conv in (self.channel_fc, self.spatial_fc, self.kernel_fc):
            if conv is not None:
                nn.init.normal_(conv.weight, std=1e-6)
        for conv in (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc):
            if conv is not None:
                nn.init.zeros_(conv.bias)
        nn.init.constant_(self.local_conv.weight, 1e-6)

    @torch.no_grad()
    def copy_weight(self, weight):
        """Starts from the weight ``(out, in, k, k)`` of an ordinary convolution."""
        matrix = weight.permute(0, 2, 1, 3).reshape(weight.shape[0] * weight.shape[2], -1)
        self.dft_weight.copy_(torch.view_as_real(torch.fft.rfft2(matrix.float())) / self.scale)

    def attentions(self, x):
        """Attentions of kernels ``(B, n)``, input channels, output channels, taps (None for 1x1) and single weights."""
        mean, k = x.mean((2, 3), keepdim=True), self.kernel_size
        z = self.act(self.bn(self.fc(mean)))
        kernels = (self.kernel_fc(z).flatten(1) / self.temperature).sigmoid() * (2 / self.kernel_num)
        channels, filters = (2 * fc(z).flatten(1).sigmoid() for fc in (self.channel_fc, self.filter_fc))
        taps = None if self.spatial_fc is None else 2 * self.spatial_fc(z).sigmoid().view(-1, 1, 1, k, k)
        local = 2 * self.local_conv(self.local_norm(mean.flatten(1)).unsqueeze(1)).sigmoid()  # (B, O k k, I)
        local = local.view(-1, self.out_channels, k, k, self.in_channels).permute(0, 1, 4, 2, 3)
        return kernels, channels, filters, taps, local

    def weights(self, x):
        """The weight for each image ``(B, out, in, k, k)``."""
        kernels, channels, filters, taps, local = self.attentions(x)
        spectrum = torch.view_as_complex(self.dft_weight.to(torch.promote_types(self.dft_weight.dtype, torch.float32)))
        spectrum = spectrum * (kernels[:, self.group] * (self.scale * self.kernel_num))
        k = self.kernel_size
        weight = torch.fft.irfft2(spectrum, s=(self.out_channels * k, self.in_channels * k))
        weight = weight.view(-1, self.out_channels, k, self.in_channels, k).transpose(2, 3)
        weight = weight * local * filters[:, :, None, None, None] * channels[:, None, :, None, None]
        return weight if taps is None else weight * taps

    def forward(self, x):
        weight = self.weights(x).flatten(0, 1).to(x.dtype)
        maps = x if self.bands is None else self.bands(x)
        y = F.conv2d(maps.reshape(1, -1, *x.shape[2:]), weight, None, self.stride, self.padding, groups=len(x))
        y = y.view(len(x), self.out_channels, *y.shape[2:])
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
