"""S4ND ConvNeXt: long convolutions by state spaces along both axes of a map, in the body of ConvNeXt.

Paper: S4ND: Modeling Images and Videos as Multidimensional Signals with State Spaces (NeurIPS 2022)
- https://arxiv.org/abs/2210.06583

Maps are channel-last (B, H, W, C) throughout.
"""

import warnings

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import S4ND, Pyramid, Stage, unwrap_state_dict
from .layers.pretrained import imagenet_cfg

__all__ = ["S4NDConvNeXt"]


class PooledGLU(nn.Module):
    """Means over windows of `stride` by `stride`, cut off at the edges, and ``GLU(W x)``."""

    def __init__(self, dim: int, dim_out: int, stride: int, device=None, dtype=None):
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, 2 * dim_out, device=device, dtype=dtype)

    def forward(self, x):
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, ceil_mode=True)
        return F.glu(self.proj(x.permute(0, 2, 3, 1)))


class Stem(nn.Module):
    """A full S4ND convolution at the image's own resolution, and pooling: ``(B, 3, H, W)`` to ``(B, H/4, W/4, C)``."""

    def __init__(self, in_chans: int, dim: int, hidden: int = 32, length: int = 16, device=None, dtype=None, **kernel):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = S4ND(in_chans, linear=True, out_channels=hidden, length=length, **kernel, **dd)
        self.pool = PooledGLU(hidden, dim, 4, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)

    def forward(self, x):
        return self.norm(self.pool(self.conv(x.permute(0, 2, 3, 1))))


class Downsample(nn.Module):
    """``GLU(W pool(S4ND(LN(x))))``: half the size, rounded up."""

    def __init__(self, dim: int, dim_out: int, length: int, device=None, dtype=None, **kernel):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.conv = S4ND(dim, linear=True, length=length, **kernel, **dd)
        self.pool = PooledGLU(dim, dim_out, 2, **dd)

    def forward(self, x):
        return self.pool(self.conv(self.norm(x)))


class Block(nn.Module):
    """ConvNeXt's block with S4ND instead of the 7x7 depthwise convolution: ``x += gamma * MLP(LN(S4ND(x)))``."""

    def __init__(
        self, dim: int, length: int, drop_path: float = 0.0, scale_init: float = 1e-6, device=None, dtype=None, **kernel
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.scale_init = scale_init
        self.conv = S4ND(dim, linear=True, length=length, **kernel, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.gamma = nn.Parameter(torch.empty(dim, **dd))
        self.drop_path = DropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gamma, self.scale_init)

    def forward(self, x):
        return x + self.drop_path(self.gamma * self.mlp(self.norm(self.conv(x))))


class S4NDConvNeXt(Pyramid):
    """ConvNeXt with S4ND for every depthwise convolution, and in stem and downsampling (arXiv 2210.06583, section 4.1).

    Args:
        img_size: Side of the images that kernels span. Images of any size fit; on larger ones, kernels reach no
            further.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        kernel: 'low_rank' (S4) or 'diagonal' (S4D).
        d_state: Real states of each kernel.
        init: Initial state matrix: 'fourier' or 'legs' for S4's, `layers.hippo.diagonal_system`'s names for S4D's.
        dt_min, dt_max: Steps of the kernels, where a pixel is 1.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (3, 3, 9, 3),
        kernel: str = "low_rank",
        d_state: int = 64,
        init: str = "fourier",
        dt_min: float = 0.1,
        dt_max: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        settings = dict(kernel=kernel, d_state=d_state, init=init, dt_min=dt_min, dt_max=dt_max)
        lengths = [-(-img_size // info["reduction"]) for info in self.feature_info]
        self.stem = Stem(in_chans, dims[0], **settings, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (dim, length) in enumerate(zip(dims, lengths, strict=True)):
            down = Downsample(dims[i - 1], dim, lengths[i - 1], **settings, **dd) if i else None
            stages.append(Stage([Block(dim, length, rate, **settings, **dd) for rate in drop_path[i]], down))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict, model):
    """For our own checkpoints; the authors' code has no weights for this model.

    The stem's kernels belong to pairs of channels, and no kernel is their sum: with other input channels they start
    from random weights.
    """
    state_dict, ours = unwrap_state_dict(state_dict), model.state_dict()
    stem = [key for key in ours if key.startswith("stem.conv.") and key in state_dict]
    anew = [key for key in stem if state_dict[key].shape != ours[key].shape]
    if anew:
        warnings.warn(f"in_chans={model.in_chans}: the stem's kernels of other channels are not loaded", stacklevel=2)
    return state_dict | {key: ours[key] for key in anew}


default_cfgs = generate_default_cfgs(
    {
        "s4nd_convnext_tiny.untrained": imagenet_cfg(
            first_conv=(),  # the stem has no convolution weights to sum
            classifier="head.fc",
            origin_url="https://github.com/state-spaces/s4",
            paper_ids="arXiv:2210.06583",
        )
    }
)


@register_model
def s4nd_convnext_tiny(pretrained=False, **kwargs):
    """S4ND-ConvNeXt-T."""
    return build_model_with_cfg(
        S4NDConvNeXt,
        "s4nd_convnext_tiny",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )
