"""MambaIR.

Paper: MambaIR: A Simple Baseline for Image Restoration with State-Space Model (ECCV 2024) - https://arxiv.org/abs/2402.15648

Groups of blocks at the image's own resolution, between an input convolution and an output convolution or pixel
shuffles. A block mixes tokens by the four scans of VMamba's first version, and channels by convolutions with channel
attention. MambaIRv2 (`mambair_v2.py`) and opensr-mamba (`mambair_opensr.py`) use the same frame.

Maps are channel-last (B, H, W, C) inside; images are NCHW.
"""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers import SS2D
from .layers.restoration import BODY_NAMES, RGB_MEAN, RestorationFrame, convert, restoration_cfg
from .layers.scan_block import CONV_MIXER_NAMES, SCAN_BLOCK_NAMES, ScanBlock

__all__ = ["MambaIR"]


class MambaIR(RestorationFrame):
    """MambaIR (arXiv 2402.15648), for images of any size.

    Args:
        in_chans: Channels of the images; RGB images are centred at the mean of DIV2K.
        dim: Inner channels.
        depths: Blocks of each group.
        d_state: States per channel of the scans.
        ssm_ratio: Inner width of the scans over `dim`.
        scale: 2, 3 or 4 for super-resolution; with 1 the network's prediction is added to the image.
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

        def block(i: int, j: int) -> nn.Module:
            mixer = SS2D(dim, ssm_ratio, d_state, gated=True, **dd)
            return ScanBlock(dim, mixer, light, rates[sum(depths[:i]) + j], **dd)

        super().__init__(
            block,
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


# The authors' names and ours; their order matters. They serve both versions and opensr-mamba.
FRAME_NAMES = [*BODY_NAMES, *SCAN_BLOCK_NAMES]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RestorationFrame) -> dict[str, Tensor]:
    """Converts the published state dict to ours."""
    return convert(state_dict, model, [*FRAME_NAMES, *CONV_MIXER_NAMES])


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
        kwargs_filter=("num_classes",),  # output channels equal input channels
        **kwargs,
    )


LIGHT = dict(dim=60, depths=(6, 6, 6, 6), d_state=10, ssm_ratio=1.2, light=True)


@register_model
def mambair_light_x2(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, for 2 times the size."""
    return _create_mambair("mambair_light_x2", pretrained, **dict(dict(LIGHT, scale=2), **kwargs))


@register_model
def mambair_light_x3(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, for 3 times the size."""
    return _create_mambair("mambair_light_x3", pretrained, **dict(dict(LIGHT, scale=3), **kwargs))


@register_model
def mambair_light_x4(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, for 4 times the size."""
    return _create_mambair("mambair_light_x4", pretrained, **dict(dict(LIGHT, scale=4), **kwargs))


@register_model
def mambair_sr_x2(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR for 2 times the size."""
    return _create_mambair("mambair_sr_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def mambair_sr_x3(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR for 3 times the size."""
    return _create_mambair("mambair_sr_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def mambair_sr_x4(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR for 4 times the size."""
    return _create_mambair("mambair_sr_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def mambair_dn(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR that removes noise from colour images."""
    return _create_mambair("mambair_dn", pretrained, **dict(dict(ssm_ratio=1.2), **kwargs))


@register_model
def mambair_car(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR that removes traces of JPEG compression from grey images."""
    return _create_mambair("mambair_car", pretrained, **dict(dict(in_chans=1, ssm_ratio=1.2), **kwargs))
