"""ConvS5 for video: a network that predicts the next frame for each frame of a clip.

Paper: Convolutional State Space Models for Long-Range Spatiotemporal Modeling (NeurIPS 2023)
- https://arxiv.org/abs/2310.19694

All frames of a clip are predicted in parallel, by a scan over time. Afterwards frames are generated one by one, at a
cost that does not depend on the number of earlier frames.
"""

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import ConvS5Layer
from .layers.memory_format import AnyMemoryFormat
from .layers.script import refuse_script

__all__ = ["ConvS5Video"]


class ResBlock(nn.Module):
    """``g(GN(Conv(g(GN(Conv(x))))) + skip(x))`` with g the tanh GELU, on ``(N, C, H, W)``."""

    def __init__(self, dim: int, dim_out: int, num_groups: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim_out, 3, padding=1, **dd)
        self.norm1 = nn.GroupNorm(num_groups, dim_out, eps=1e-6, **dd)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, **dd)
        self.norm2 = nn.GroupNorm(num_groups, dim_out, eps=1e-6, **dd)
        self.skip = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1, **dd)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + self.skip(x))


class ConvS5Video(AnyMemoryFormat):
    """Next-frame model: a ResNet encoder of each frame, ConvS5 layers over time, and a mirrored decoder.

    Args:
        in_chans: Channels of a frame.
        dims: Widths of the encoder's blocks; the map is halved between two of them.
        dim: Channels U of the ConvS5 layers.
        depth: Number of layers.
        d_state: Real states of each layer, at every pixel of the small map.
        blocks: Number of HiPPO blocks in the initial states.
        head: Kind of `layers.ConvS5Head`.
        num_groups: Groups of the GroupNorms.
        drop: Dropout in the layers.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_chans: int = 1,
        dims: tuple[int, ...] = (64, 128, 256),
        dim: int = 256,
        depth: int = 8,
        d_state: int = 256,
        blocks: int = 1,
        head: str = "resnet",
        num_groups: int = 32,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_chans, self.reduction = in_chans, 2 ** (len(dims) - 1)
        down, up = [], [nn.Conv2d(dim, dims[-1], 1, **dd)]
        for i, width in enumerate(dims):
            down += [nn.AvgPool2d(2)] * (i > 0) + [ResBlock(dims[i - 1] if i else in_chans, width, num_groups, **dd)]
        for i, width in reversed(list(enumerate(dims))):
            up += [ResBlock(dims[min(i + 1, len(dims) - 1)], width, num_groups, **dd)]
            up += [nn.Upsample(scale_factor=2, mode="nearest")] * (i > 0)
        self.encoder = nn.Sequential(*down, nn.Conv2d(dims[-1], dim, 1, **dd))
        self.layers = nn.ModuleList(
            ConvS5Layer(dim, head, "post", num_groups, drop, d_state=d_state, blocks=blocks, **dd) for _ in range(depth)
        )
        self.decoder = nn.Sequential(*up, nn.Conv2d(dims[0], in_chans, 3, padding=1, **dd))

    def forward(self, frames, states=None):
        """Predicts the frame after each frame, given it and the frames before.

        Args:
            frames: ``(B, T, C, H, W)`` with values in [-1, 1]; H and W multiples of `reduction`.
            states: States of the layers after the frames before these; None at the start.

        Returns:
            The next frames ``(B, T, C, H, W)``, and the states after these frames.

        Raises:
            ValueError: a shape does not fit.
        """
        if frames.dim() != 5 or frames.shape[2] != self.in_chans:
            raise ValueError(f"frames: expected (B, T, {self.in_chans}, H, W), got {tuple(frames.shape)}")
        if frames.shape[3] % self.reduction or frames.shape[4] % self.reduction:
            raise ValueError(
                f"frames: expected sides that are multiples of {self.reduction}, got {tuple(frames.shape)}"
            )
        x = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        x, after = x.permute(1, 0, 3, 4, 2), []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, None if states is None else states[i])
            after.append(state)
        y = self.decoder(x.permute(1, 0, 4, 2, 3).flatten(0, 1))
        return F.tanh(y).unflatten(0, frames.shape[:2]), after

    def generate(self, frames, steps):
        """Continues clips ``(B, T, C, H, W)`` by `steps` frames, feeding each generated frame back to the model."""
        y, states = self(frames)
        made = [y[:, -1:]]
        for _ in range(steps - 1):
            y, states = self(made[-1], states)
            made.append(y)
        return torch.cat(made, 1)


def _cfg():
    return {"num_classes": 0, "input_size": (1, 64, 64), "mean": (0.5,), "std": (0.5,), "paper_ids": "arXiv:2310.19694"}


default_cfgs = generate_default_cfgs({"convs5_video.untrained": _cfg()})


@register_model
def convs5_video(pretrained=False, **kwargs):
    """The configuration published for Moving-MNIST, 64 px."""
    filtered = ("num_classes", "global_pool")
    return build_model_with_cfg(ConvS5Video, "convs5_video", pretrained, kwargs_filter=filtered, **kwargs)
