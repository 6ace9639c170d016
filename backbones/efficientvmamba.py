"""EfficientVMamba.

Paper: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba (AAAI 2025) - https://arxiv.org/abs/2403.09977

A light pyramid. Its first two stages mix tokens with ES2D, a selective scan of every second token of every second row:
four scans over a quarter of the map each, instead of four over all of it. A parallel depthwise convolution couples
what the scans keep apart. The last two stages are the inverted residuals of EfficientNet.

Maps are channel-last (B, H, W, C) throughout.
"""

import re
from functools import partial

import torch
from timm.layers import DropPath, PatchEmbed, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models._features_fx import register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import nn

from linzoo.ops import scan_order

from .layers import SS2D, ChannelGate, Pyramid, Stage, zero_pad
from .layers.checkpoint import SS2D_NAMES, VMAMBA_EARLY_NAMES, rename, reshape_as, unwrap_state_dict
from .layers.pretrained import imagenet_cfg

__all__ = ["EfficientVMamba"]


def atrous_routes(H, W, device=None):
    """One route over each of the four phases of a map with even sides, ``(4, H * W / 4)``.

    Phase ``k = 2 j + i`` holds the tokens of rows ``i, i + 2, ...`` and columns ``j, j + 2, ...``. The phases of even
    rows are walked row by row, those of odd rows column by column.
    """
    even, odd = scan_order.atrous(H, W, 2, device).view(2, 2, H // 2, W // 2)
    return torch.stack([even.flatten(1), odd.mT.flatten(1)], dim=1).flatten(0, 1)


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class ES2D(SS2D):
    """Efficient 2-D scanning (section 3.2): every token is visited once, by the scan of its phase."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, ratio=2.0, d_state=16, gated=True, device=device, dtype=dtype)

    def scan(self, p):
        """Scans each phase of the map `p` ``(B, H, W, D)``.

        Zeros make the sides even; a state decays when its scan passes over them. All scans read and write the map
        where it is stored. A token has one [r, B, C], that of its phase: the projection is a linear map per phase, and
        its output is expanded over the scans like the map.
        """
        bottom, right = p.shape[1] % 2, p.shape[2] % 2
        p = zero_pad(p, (0, 0, 0, right, 0, bottom)).contiguous()
        B, H, W, D = p.shape
        x_proj = self.s6.x_proj.unflatten(0, (2, 2))  # k = 2 j + i
        grid = p.view(B, H // 2, 2, W // 2, 2, D)
        projected = torch.einsum("bhiwjd,jiod->bhiwjo", grid, x_proj).flatten(1, 4).unsqueeze(2)
        projected, order = projected.expand(-1, -1, 4, -1), atrous_routes(H, W, p.device)
        y = self.s6.scan(p.view(B, H * W, 1, D), projected, order, merge=True)
        return zero_pad(y.view(B, H, W, D), (0, 0, 0, -right, 0, -bottom))


class ConvBranch(nn.Sequential):
    """``Conv1x1(GELU(BN(DWConv3x3(x))))``."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EVSSBlock(nn.Module):
    """Efficient visual state space block (section 3.3): ``x += se(ES2D(u)) + se(conv(u))`` with ``u = LN(x)``.

    Both branches share the module `se`, but each is weighted by its own values.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = ES2D(dim, **dd)
        self.conv_branch = ConvBranch(dim, **dd)
        self.se = ChannelGate(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        u = self.norm(x)
        y = self.se(self.mixer(u).flatten(1, 2)) + self.se(self.conv_branch(u).flatten(1, 2))
        return x + self.drop_path(y).view(x.shape)


class ConvBlock(InvertedResidual):
    """Inverted residual with four times the width, and squeeze and excite, on a channel-last map."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        se_layer = partial(SqueezeExcite, rd_ratio=1 / 8)
        super().__init__(dim, dim, exp_ratio=4, se_layer=se_layer, drop_path_rate=drop_path, device=device, dtype=dtype)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientVMamba(Pyramid):
    """EfficientVMamba (arXiv 2403.09977).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dims: Channels of each stage.
        depths: Blocks of each stage: two stages of EVSS blocks, two of inverted residuals.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (48, 96, 192, 384),
        depths: tuple[int, ...] = (2, 2, 4, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        self.stem = PatchEmbed(None, 4, in_chans, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, (block, dim) in enumerate(zip((EVSSBlock, EVSSBlock, ConvBlock, ConvBlock), dims, strict=True)):
            blocks = [block(dim, rate, **dd) for rate in drop_path[i]]
            stages.append(Stage(blocks, PatchMerging(dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^module\.module\.", ""),
    *VMAMBA_EARLY_NAMES,
    *SS2D_NAMES,
    (r"^patch_embed\.0\.", "stem.proj."),
    (r"^patch_embed\.2\.", "stem.norm."),
    (r"^layers\.(\d+)\.", r"stages.\1."),
    (r"\.conv_branch\.0\.", ".conv_branch.conv1."),
    (r"\.conv_branch\.1\.", ".conv_branch.norm."),
    (r"\.conv_branch\.3\.", ".conv_branch.conv2."),
    (r"\.global_reduce\.", ".fc1."),
    (r"\.channel_select\.", ".fc2."),
    (r"\.conv_pw\.0\.", ".conv_pw."),
    (r"\.conv_pw\.1\.", ".bn1."),
    (r"\.conv_dw\.0\.", ".conv_dw."),
    (r"\.conv_dw\.1\.", ".bn2."),
    (r"\.conv_pw2\.0\.", ".conv_pwl."),
    (r"\.conv_pw2\.1\.", ".bn3."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
]


def _convert_key(key):
    key = rename(key, _RENAMES)
    # Patch merging belongs to the stage that follows it.
    if match := re.fullmatch(r"stages\.(\d+)\.(?:downsample|\d+)\.((?:norm|reduction)\.\w+)", key):
        return f"stages.{int(match[1]) + 1}.downsample.{match[2]}"
    # The convolutional stages are numbered sequences: a permutation, the blocks from 1 on, another, patch merging.
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.*)", key):
        return f"stages.{match[1]}.blocks.{int(match[2]) - 1}.{match[3]}"
    return key


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict, from a classifier or a dense predictor, to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.proj.weight" in state_dict:
        return state_dict
    return reshape_as({_convert_key(key): value for key, value in state_dict.items()}, model)


def _cfg(**kwargs):
    return imagenet_cfg(
        first_conv="stem.proj",
        classifier="head.fc",
        license="apache-2.0",
        origin_url="https://github.com/TerryPei/EfficientVMamba",
        paper_ids="arXiv:2403.09977",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "efficientvmamba_t.in1k": _cfg(),
        "efficientvmamba_s.in1k": _cfg(),
        "efficientvmamba_b.in1k": _cfg(),
    }
)


def _create_efficientvmamba(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        EfficientVMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def efficientvmamba_t(pretrained=False, **kwargs):
    """EfficientVMamba-T: 6.5M parameters, 0.8 GMACs."""
    model_args = dict(dims=(48, 96, 192, 384), depths=(2, 2, 4, 2))
    return _create_efficientvmamba("efficientvmamba_t", pretrained, **dict(model_args, **kwargs))


@register_model
def efficientvmamba_s(pretrained=False, **kwargs):
    """EfficientVMamba-S: 11.3M parameters, 1.3 GMACs."""
    model_args = dict(dims=(64, 128, 256, 512), depths=(2, 2, 4, 2))
    return _create_efficientvmamba("efficientvmamba_s", pretrained, **dict(model_args, **kwargs))


@register_model
def efficientvmamba_b(pretrained=False, **kwargs):
    """EfficientVMamba-B: 33.7M parameters, 4.0 GMACs."""
    model_args = dict(dims=(96, 192, 384, 768), depths=(2, 2, 9, 2))
    return _create_efficientvmamba("efficientvmamba_b", pretrained, **dict(model_args, **kwargs))
