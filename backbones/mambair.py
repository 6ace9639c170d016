"""MambaIR.

Paper: MambaIR: A Simple Baseline for Image Restoration with State-Space Model (ECCV 2024) - https://arxiv.org/abs/2402.15648

Groups of blocks at the image's own resolution, between a convolution in and a convolution, or pixel shuffles, out. A
block mixes tokens by the four scans of VMamba's first version, and channels by convolutions with channel attention.
MambaIRv2 (`mambair_v2.py`) and opensr-mamba (`mambair_opensr.py`) stand in the same frame.

Maps are channel-last (B, H, W, C) inside; images are NCHW.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers import SS2D, Conv2dNHWC
from .layers.checkpoint import SS2D_NAMES
from .layers.restoration import BODY_NAMES, RGB_MEAN, RestorationFrame, convert, restoration_cfg

__all__ = ["MambaIR"]


class ChannelAttention(nn.Module):
    """``x * sigmoid(W_2 ReLU(W_1 mean x))`` of a map ``(B, H, W, C)``, ``C // reduction`` wide inside."""

    def __init__(self, dim: int, reduction: int = 30, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // reduction, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()


class ConvMixer(nn.Sequential):
    """Channel mixer of a map ``(B, H, W, C)``: convolutions and channel attention (MambaIR, section 3.3).

    Two convolutions 3x3 through ``C // 3`` channels; `light`: through ``C // 2`` channels, each 1x1 and then depthwise
    3x3, the second one dilated.
    """

    def __init__(self, dim: int, light: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        if light:
            inner = dim // 2
            enter = [Conv2dNHWC(dim, inner, 1, **dd), Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, **dd)]
            leave = [Conv2dNHWC(inner, dim, 1, **dd),
                     Conv2dNHWC(dim, dim, 3, padding=2, dilation=2, groups=dim, **dd)]  # fmt: skip
        else:
            enter = [Conv2dNHWC(dim, dim // 3, 3, padding=1, **dd)]
            leave = [Conv2dNHWC(dim // 3, dim, 3, padding=1, **dd)]
        super().__init__(*enter, nn.GELU(), *leave, ChannelAttention(dim, **dd))


class Block(nn.Module):
    """``x = s_1 x + SS2D(LN(x));  x = s_2 x + ConvMixer(LN(x))`` with learnt scales s of each channel."""

    def __init__(
        self, dim: int, ratio: float, d_state: int, light: bool, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = SS2D(dim, ratio, d_state, gated=True, **dd)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = ConvMixer(dim, light, **dd)
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale1)
        nn.init.ones_(self.scale2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale1 + self.drop_path(self.mixer(self.norm1(x)))
        return x * self.scale2 + self.mlp(self.norm2(x))


class MambaIR(RestorationFrame):
    """MambaIR (arXiv 2402.15648), for images of any size.

    Args:
        in_chans: Channels of the images; RGB ones are centred at the mean of DIV2K.
        dim: Channels inside.
        depths: Blocks of each group.
        d_state: States per channel of the scans.
        ssm_ratio: Inner width of the scans over `dim`.
        scale: 2, 3 or 4 for super-resolution; 1 adds what the network predicts to the image.
        light: Depthwise convolutions as channel mixers, and a head of one convolution.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        dim: int = 180,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        scale: int = 1,
        light: bool = False,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        super().__init__(
            lambda i, j: Block(dim, ssm_ratio, d_state, light, rates[sum(depths[:i]) + j], **dd),
            in_chans,
            None,
            dim,
            depths,
            scale,
            direct=light or scale == 1,
            residual=scale == 1,
            mean=RGB_MEAN if in_chans == 3 else None,
            **dd,
        )


# The authors' names and ours; their order counts. Both versions, and opensr-mamba, have them.
FRAME_NAMES = [
    *BODY_NAMES,
    (r"\.self_attention\.", ".op."),
    *SS2D_NAMES,
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.skip_scale$", ".scale1"),
    (r"\.skip_scale2$", ".scale2"),
]
_RENAMES = [
    *FRAME_NAMES,
    (r"\.conv_blk\.cab\.(\d)\.attention\.1\.", r".mlp.\1.fc1."),
    (r"\.conv_blk\.cab\.(\d)\.attention\.3\.", r".mlp.\1.fc2."),
    (r"\.conv_blk\.cab\.", ".mlp."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RestorationFrame) -> dict[str, Tensor]:
    """Converts the published state dict to ours."""
    return convert(state_dict, model, _RENAMES)


_ORIGIN = dict(origin_url="https://github.com/csguoh/MambaIR", paper_ids="arXiv:2402.15648", license="apache-2.0")
_RGB = ("light_x2", "light_x3", "light_x4", "sr_x2", "sr_x3", "sr_x4", "dn")

default_cfgs = generate_default_cfgs(
    {
        **{f"mambair_{name}": restoration_cfg(**_ORIGIN) for name in _RGB},
        "mambair_car": restoration_cfg(1, **_ORIGIN),
    }
)


def _create_mambair(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        MambaIR,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes",),  # what comes out has the channels of what goes in
        **kwargs,
    )


LIGHT = dict(dim=60, depths=(6, 6, 6, 6), d_state=10, ssm_ratio=1.2, light=True)


@register_model
def mambair_light_x2(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, to 2 times the size."""
    return _create_mambair("mambair_light_x2", pretrained, **dict(dict(LIGHT, scale=2), **kwargs))


@register_model
def mambair_light_x3(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, to 3 times the size."""
    return _create_mambair("mambair_light_x3", pretrained, **dict(dict(LIGHT, scale=3), **kwargs))


@register_model
def mambair_light_x4(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, to 4 times the size."""
    return _create_mambair("mambair_light_x4", pretrained, **dict(dict(LIGHT, scale=4), **kwargs))


@register_model
def mambair_sr_x2(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR to 2 times the size."""
    return _create_mambair("mambair_sr_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def mambair_sr_x3(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR to 3 times the size."""
    return _create_mambair("mambair_sr_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def mambair_sr_x4(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR to 4 times the size."""
    return _create_mambair("mambair_sr_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def mambair_dn(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR that removes noise from colour images."""
    return _create_mambair("mambair_dn", pretrained, **dict(dict(ssm_ratio=1.2), **kwargs))


@register_model
def mambair_car(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR that removes traces of JPEG compression from grey images."""
    return _create_mambair("mambair_car", pretrained, **dict(dict(in_chans=1, ssm_ratio=1.2), **kwargs))
