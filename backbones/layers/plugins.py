"""Small modules for any backbone: TVConv, weighted convolution, scSE, per-channel patches, WaRA.

Maps are ``(B, C, H, W)``, as in the convolutional networks that these modules were published for.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from .haar import haar, inverse_haar

# --- TVConv ---------------------------------------------------------------------------------------------------------


class TVConv(nn.Module):
    """Translation-variant depthwise convolution (CVPR 2022, arXiv 2203.10489): a kernel for every position.

    A small network makes the kernels from a learned map of positions; they do not depend on the input. It is meant for
    images with one layout, such as aligned faces.

    Args:
        channels: C.
        size: Height and width of the *output*, which are fixed.
        kernel_size: Side of the kernels, odd.
        stride: Step.
        position_channels: Channels of the position map.
        hidden: Channels inside the network.
        layers: Its hidden layers.
        bias: Adds a bias for every position, from its own network.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        kernel_size: int = 3,
        stride: int = 1,
        position_channels: int = 4,
        hidden: int = 64,
        layers: int = 3,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.channels, self.size, self.kernel_size, self.stride = channels, tuple(size), kernel_size, stride
        self.positions = nn.Parameter(torch.empty(1, position_channels, *size, **dd))
        widths = [position_channels] + [hidden] * (layers + 1)

        def network(out):
            hidden_layers = [
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False, **dd),
                    nn.LayerNorm((after, *size), **dd),
                    nn.ReLU(),
                )
                for before, after in zip(widths[:-1], widths[1:], strict=True)
            ]
            return nn.Sequential(*hidden_layers, nn.Conv2d(hidden, out, 3, padding=1, bias=False, **dd))

        self.weight_net = network(channels * kernel_size**2)
        self.bias_net = network(channels) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.positions)

    def forward(self, x):
        """``(B, C, H, W)`` to ``(B, C, *size)``."""
        k = self.kernel_size
        patches = F.unfold(x, k, padding=k // 2, stride=self.stride).view(len(x), self.channels, k * k, -1)
        if patches.shape[-1] != self.size[0] * self.size[1]:
            raise ValueError(f"x: expected an input whose output is {self.size}, got {tuple(x.shape)}")
        weight = self.weight_net(self.positions).view(self.channels, k * k, -1)
        y = (weight * patches).sum(2).unflatten(-1, self.size)
        return y if self.bias_net is None else y + self.bias_net(self.positions)


# --- weighted convolution -------------------------------------------------------------------------------------------


class _Weighted:
    """See `WeightedConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *args,
        den: Sequence[float] | None = None,
        trainable: bool = False,
        **kwargs,
    ):
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        radius = self.kernel_size[0] // 2
        if len(set(self.kernel_size)) > 1 or not self.kernel_size[0] % 2:
            raise ValueError(f"kernel_size: expected equal odd sides, got {self.kernel_size}")
        self.initial = [1.0] * radius if den is None else list(den)
        if len(self.initial) != radius:
            raise ValueError(f"den: expected {radius} values for a kernel of {self.kernel_size[0]}, got {den}")
        values = torch.empty(radius, dtype=self.weight.dtype, device=self.weight.device)
        if trainable:
            self.den = nn.Parameter(values)
        else:
            self.register_buffer("den", values)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if hasattr(self, "den"):  # the base's constructor calls this before `den` exists
            self.den.copy_(torch.tensor(self.initial, dtype=torch.float64, device=self.den.device))

    def density(self):
        """The weight of each tap: the outer product of alpha with itself."""
        alpha, density = torch.cat([self.den, torch.ones_like(self.den[:1]), self.den.flip(0)]), None
        if not len(self.den):
            alpha = self.weight.new_ones(1)
        for _ in self.kernel_size:
            density = alpha if density is None else density.unsqueeze(-1) * alpha
        return density

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.density(), self.bias)


class WeightedConv2d(_Weighted, nn.Conv2d):
    """Weighted convolution (arXiv 2505.24527): taps count less, or more, the farther they are from the middle.

    ``weight * (alpha (x) alpha)`` with ``alpha = [d_1 .. d_r, 1, d_r .. d_1]``; it costs nothing at inference.

    Args:
        args, kwargs: As for `torch.nn.Conv2d`; the kernel must be square and odd.
        den: ``d_1 .. d_r``, the outermost first; None for ones.
        trainable: Whether they are parameters.
    """


class WeightedConv1d(_Weighted, nn.Conv1d):
    """`WeightedConv2d` along one axis."""


class WeightedConv3d(_Weighted, nn.Conv3d):
    """`WeightedConv2d` along three axes."""


# --- scSE -----------------------------------------------------------------------------------------------------------


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze and excitation (MICCAI 2018, arXiv 1803.02579).

    Args:
        channels: C of ``(B, C, H, W)``.
        reduction: C over the inner width of the channel gate.
        combine: 'max' (the authors' code) or 'sum' (their first paper) of the two gated maps.
    """

    def __init__(self, channels: int, reduction: int = 2, combine: str = "max", device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if combine not in ("max", "sum"):
            raise ValueError(f"combine: expected 'max' or 'sum', got {combine!r}")
        self.combine = combine
        self.fc1 = nn.Linear(channels, channels // reduction, **dd)
        self.fc2 = nn.Linear(channels // reduction, channels, **dd)
        self.conv = nn.Conv2d(channels, 1, 1, **dd)

    def gated(self, x):
        """The map gated by channel, and the map gated by position."""
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None], x * self.conv(x).sigmoid()

    def forward(self, x):
        by_channel, by_place = self.gated(x)
        return torch.maximum(by_channel, by_place) if self.combine == "max" else by_channel + by_place


# --- ChannelViT -----------------------------------------------------------------------------------------------------


def sample_channels(channels):
    """Hierarchical channel sampling: first how many of `channels`, then which, in random order; a list."""
    return torch.randperm(channels)[: torch.randint(1, channels + 1, ())].tolist()


class ChannelPatchEmbed(nn.Module):
    """Separate tokens for every channel (ChannelViT, ICLR 2024, arXiv 2309.16108), for images with many, or missing,
    channels, as in microscopy.

    All channels share the projection and the positions; each has an embedding. C channels give C times as many tokens,
    so a mixer of linear cost takes C times as long.

    Args:
        img_size: Side of the square images that fit the position table.
        patch_size: Side of a patch.
        in_chans: Channels C, each with an embedding.
        embed_dim: Width D.
        sampling: Hierarchical channel sampling in training: each batch keeps a random subset of its channels.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        sampling: bool = True,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size, self.grid, self.sampling = patch_size, img_size // patch_size, sampling
        self.proj = nn.Conv2d(1, embed_dim, patch_size, patch_size, **dd)
        self.channel_embed = nn.Parameter(torch.empty(in_chans, embed_dim, **dd))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2 + 1, embed_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in (self.channel_embed, self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)

    def positions(self, height, width, channels):
        """Positions of the patches ``(1, N, D)``.

        As published, the table is resized, with a scale that is 0.1 of a patch too large, unless an image is square,
        has the table's size and a single channel.
        """
        table = self.pos_embed[:, 1:]
        if channels == 1 and height == width == self.grid:
            return table
        table = table.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = tuple((side + 0.1) / self.grid for side in (height, width))
        resized = F.interpolate(table.float(), scale_factor=scale, mode="bicubic").to(table.dtype)
        return resized.flatten(2).transpose(1, 2)

    def forward(self, x, channels=None):
        """Images to tokens.

        Args:
            x: ``(B, C', H, W)``, sides that are multiples of the patch's.
            channels: Which of the C channels these are, C' indices in their order; None for all, C' = C.

        Returns:
            ``(B, 1 + C' N, D)``: the class token, then all patches of the first channel, then those of the second ...

        Raises:
            ValueError: `channels` does not fit `x` or the embeddings.
        """
        channels = list(range(len(self.channel_embed))) if channels is None else list(channels)
        if len(channels) != x.shape[1] or not all(0 <= c < len(self.channel_embed) for c in channels):
            raise ValueError(
                f"channels: expected {x.shape[1]} indices below {len(self.channel_embed)} for x {tuple(x.shape)}, "
                f"got {channels}"
            )
        if self.training and self.sampling:
            kept = sample_channels(len(channels))
            x, channels = x[:, kept], [channels[c] for c in kept]
        batch, count = x.shape[:2]
        patches = self.proj(x.flatten(0, 1).unsqueeze(1))
        grid = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2).unflatten(0, (batch, count))
        tokens = tokens + self.channel_embed[channels].unsqueeze(1) + self.positions(*grid, count).unsqueeze(1)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        return torch.cat([first, tokens.flatten(1, 2)], 1)


# --- WaRA -----------------------------------------------------------------------------------------------------------


class WaRA(nn.Module):
    """Wavelet low-rank adaptation (arXiv 2506.24092) of a frozen linear map.

    One level of Haar wavelets transforms the features and the tokens. One low-rank map ``B A`` of half the width acts
    on all four bands. The inverse transform is added to the frozen map's output. B starts at 0. There was no code to
    compare with: this follows the abstract.

    Args:
        linear: `torch.nn.Linear` with even numbers of features.
        rank: r.
        alpha: The update is scaled by alpha / rank.
        gains: A learned gain per band. Without gains the transform along the tokens cancels and is left out, and the
            update is one matrix, `delta`.
    """

    def __init__(self, linear: nn.Linear, rank: int = 4, alpha: float | None = None, gains: bool = False):
        super().__init__()
        if linear.in_features % 2 or linear.out_features % 2:
            raise ValueError(f"linear: expected even numbers of features, got {linear}")
        dd: dict = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.linear = linear.requires_grad_(False)
        self.scale = (rank if alpha is None else alpha) / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features // 2, **dd))
        self.B = nn.Parameter(torch.empty(linear.out_features // 2, rank, **dd))
        self.gains = nn.Parameter(torch.empty(4, **dd)) if gains else None
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        nn.init.zeros_(self.B)
        if self.gains is not None:
            nn.init.ones_(self.gains)

    def bands(self, x):
        """Low and high band of features, each as low and high band of tokens: LL, LH, HL, HH; ``(..., T/2, D/2)``."""
        return [part for band in haar(x, -1) for part in haar(band, -2)]

    def low_rank(self, band):
        return self.scale * F.linear(F.linear(band, self.A), self.B)

    def update(self, x):
        """The update for tokens ``(..., T, D)``."""
        if self.gains is None:
            return inverse_haar(*(self.low_rank(band) for band in haar(x, -1)), -1)
        tokens = x.shape[-2]
        padded = self.bands(F.pad(x, (0, 0, 0, tokens % 2)))
        bands = [gain * self.low_rank(b) for gain, b in zip(self.gains, padded, strict=True)]
        low, high = inverse_haar(*bands[:2], -2), inverse_haar(*bands[2:], -2)
        return inverse_haar(low, high, -1)[..., :tokens, :]

    def delta(self):
        """The update as a matrix ``(out, in)`` to add to the weight; only without gains."""
        if self.gains is not None:
            raise ValueError("gains: with a gain per band the update is no matrix")
        eye = torch.eye(self.linear.in_features, device=self.A.device, dtype=self.A.dtype)
        return self.update(eye).T

    def forward(self, x):
        return self.linear(x) + self.update(x)
