"""VMamba.

Paper: VMamba: Visual State Space Model (NeurIPS 2024) - https://arxiv.org/abs/2401.10166

A four-stage hierarchy like Swin's. Its token mixer, SS2D, walks the map along four routes. The first version (v0,
January 2024) has gated blocks with 16 states per channel and no MLP. Later versions have one state, no gate and an MLP.

Maps are channel-last (B, H, W, C) throughout.
"""

import re

from timm.layers import DropPath, PatchEmbed, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import nn

from .layers import SS2D, Conv2dNHWC, ConvDownsample, Pyramid, Stage, channel_mixer
from .layers.checkpoint import SS2D_NAMES, VMAMBA_EARLY_NAMES, rename, reshape_as, unwrap_state_dict
from .layers.pretrained import imagenet_cfg

__all__ = ["VMamba"]


class ConvStem(nn.Module):
    """Two strided convolutions, each with a LayerNorm, GELU between: ``(B, 3, H, W)`` to ``(B, H/4, W/4, C)``."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = Conv2dNHWC(in_chans, dim // 2, 3, 2, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.conv2 = Conv2dNHWC(dim // 2, dim, 3, 2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x.permute(0, 2, 3, 1))))
        return self.norm2(self.conv2(x))


class Block(nn.Module):
    """``x += SS2D(LN(x))``, then ``x += MLP(LN(x))`` if `mlp_ratio` is not 0; `mlp` names the MLP."""

    def __init__(
        self,
        dim: int,
        ratio: float,
        d_state: int,
        gated: bool,
        mlp_ratio: float,
        mlp: str = "mlp",
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = SS2D(dim, ratio, d_state, gated, **dd)
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
            self.mlp = channel_mixer(mlp)(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x):
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class VMamba(Pyramid):
    """VMamba (arXiv 2401.10166).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dims: Channels of each stage.
        depths: Blocks of each stage.
        ssm_ratio: Inner width of SS2D over the block's.
        d_state: States per channel.
        gated: Use gated SS2D, as in the first version.
        mlp_ratio: Hidden over outer width of the MLPs; 0 for blocks without MLP.
        mlp: Kind of MLP, a name from `layers.channel_mixer`: 'mlp', 'grkan', 'bspline_kan', 'fourier_kan'.
        conv_embed: Overlapping convolutions as stem and between stages; False for 4x4 patches and patch merging.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        ssm_ratio: float = 1.0,
        d_state: int = 1,
        gated: bool = False,
        mlp_ratio: float = 4.0,
        mlp: str = "mlp",
        conv_embed: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        if conv_embed:
            self.stem = ConvStem(in_chans, dims[0], **dd)
        else:
            self.stem = PatchEmbed(None, 4, in_chans, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        down = ConvDownsample if conv_embed else PatchMerging
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [Block(dim, ssm_ratio, d_state, gated, mlp_ratio, mlp, rate, **dd) for rate in drop_path[i]]
            stages.append(Stage(blocks, down(dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    *VMAMBA_EARLY_NAMES,
    (r"\.op\.(x_proj|dt_projs)\.weight$", r".op.\1_weight"),  # the single-file rewrite's
    *SS2D_NAMES,
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm1."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
]
_CONV_STEM = {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"}
_PATCH_STEM = {"0": "proj", "2": "norm"}


def checkpoint_filter_fn(state_dict, model):
    """Converts any of the three published layouts to ours.

    These are the layouts of the training code, of the first version's files, and of the single-file rewrite. Parameters
    that a layout flattens over the routes, or stores as 1x1 convolutions, are reshaped.
    """
    state_dict = unwrap_state_dict(state_dict)
    if any(key.startswith("stem.") for key in state_dict):
        return state_dict
    patches = isinstance(model.stem, PatchEmbed)
    out = {}
    for key, value in state_dict.items():
        key = rename(key, _RENAMES)
        if match := re.fullmatch(r"patch_embed\.(\d)\.(\w+)", key):
            key = f"stem.{(_PATCH_STEM if patches else _CONV_STEM)[match[1]]}.{match[2]}"
        elif match := re.fullmatch(r"layers\.(\d+)\.downsample\.(\w+)\.(\w+)", key):
            part = {"1": "norm" if patches else "conv", "2": "reduction", "3": "norm"}.get(match[2], match[2])
            key = f"stages.{int(match[1]) + 1}.downsample.{part}.{match[3]}"
        out[key] = value
    return reshape_as(out, model)


_WEIGHTS = "https://github.com/MzeroMiko/VMamba/releases/download/%23"


def _cfg(url, first_conv="stem.conv1"):
    return imagenet_cfg(
        url=_WEIGHTS + url,
        first_conv=first_conv,
        classifier="head.fc",
        license="mit",
        origin_url="https://github.com/MzeroMiko/VMamba",
        paper_ids="arXiv:2401.10166",
    )


default_cfgs = generate_default_cfgs(
    {
        "vmamba_t.in1k": _cfg("v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_s.in1k": _cfg("v2cls/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_b.in1k": _cfg("v2cls/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_t_s2l5.in1k": _cfg("v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_s_s1l20.in1k": _cfg("v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_b_s1l20.in1k": _cfg("v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_t_v0.in1k": _cfg("v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", first_conv="stem.proj"),
        "vmamba_s_v0.in1k": _cfg("v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", first_conv="stem.proj"),
        "vmamba_b_v0.in1k": _cfg("v0cls/vssmbase_dp06_ckpt_epoch_241.pth", first_conv="stem.proj"),
    }
)


def _create_vmamba(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


BASE_DIMS = (128, 256, 512, 1024)
V0 = dict(ssm_ratio=2.0, d_state=16, gated=True, mlp_ratio=0.0, conv_embed=False)


@register_model
def vmamba_t(pretrained=False, **kwargs):
    """VMamba-T, published as s1l8."""
    model_args = dict(depths=(2, 2, 8, 2), ssm_ratio=1.0)
    return _create_vmamba("vmamba_t", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_s(pretrained=False, **kwargs):
    """VMamba-S, published as s2l15."""
    model_args = dict(depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_s", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_b(pretrained=False, **kwargs):
    """VMamba-B, published as s2l15."""
    model_args = dict(dims=BASE_DIMS, depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_b", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_t_s2l5(pretrained=False, **kwargs):
    """VMamba-T with twice the inner width and three fewer blocks."""
    model_args = dict(depths=(2, 2, 5, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_t_s2l5", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_s_s1l20(pretrained=False, **kwargs):
    """VMamba-S with half the inner width and five more blocks."""
    model_args = dict(depths=(2, 2, 20, 2), ssm_ratio=1.0)
    return _create_vmamba("vmamba_s_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_b_s1l20(pretrained=False, **kwargs):
    """VMamba-B with half the inner width and five more blocks."""
    model_args = dict(dims=BASE_DIMS, depths=(2, 2, 20, 2), ssm_ratio=1.0)
    return _create_vmamba("vmamba_b_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_t_v0(pretrained=False, **kwargs):
    """The first VMamba-T."""
    model_args = dict(V0, depths=(2, 2, 9, 2))
    return _create_vmamba("vmamba_t_v0", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_s_v0(pretrained=False, **kwargs):
    """The first VMamba-S."""
    model_args = dict(V0, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_s_v0", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_b_v0(pretrained=False, **kwargs):
    """The first VMamba-B."""
    model_args = dict(V0, dims=BASE_DIMS, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_b_v0", pretrained, **dict(model_args, **kwargs))
