"""RWKV-SAM's backbone.

Paper: Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model
- https://arxiv.org/abs/2406.19369

Two convolutional stages (MBConv, strides 4 and 8) and Vision-RWKV blocks at stride 16, linear in the tokens of a
1024 px image.

Maps are channel-last (B, H, W, C).
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import nn

from .layers import ChannelMix, Conv2dNHWC, Pyramid, RWKVBlock, SpatialMix, Stage
from .layers.checkpoint import rename, reshape_as, unwrap_state_dict
from .layers.pretrained import imagenet_cfg
from .layers.rwkv import RWKV_NAMES, stack_mixes

__all__ = ["RWKVSAMBackbone"]

_layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Stem(nn.Module):
    """Images ``(B, C, H, W)`` to maps ``(B, H / 2, W / 2, dim)``: two 3x3 convolutions, LayerNorm and GELU between."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, padding=1, **dd)
        self.norm1 = _layer_norm(dim, **dd)
        self.conv2 = Conv2dNHWC(dim, dim, 3, padding=1, **dd)

    def forward(self, x):
        return self.conv2(F.gelu(self.norm1(self.conv1(x).permute(0, 2, 3, 1))))


class MBConv(nn.Module):
    """``conv3(GELU(conv2(GELU(conv1(LN(x)))))) + shortcut(x)``: 1x1, depthwise 3x3 with the stride, 1x1; the inner
    width is four times as large. The shortcut averages if the stride is 2, and has a 1x1 convolution if the width
    changes.
    """

    def __init__(self, dim: int, dim_out: int, stride: int = 1, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = 4 * dim_out
        self.stride = stride
        self.norm = _layer_norm(dim, **dd)
        self.conv1 = Conv2dNHWC(dim, hidden, 1, **dd)
        self.conv2 = Conv2dNHWC(hidden, hidden, 3, stride, padding=1, groups=hidden, **dd)
        self.conv3 = Conv2dNHWC(hidden, dim_out, 1, **dd)
        self.expand = nn.Identity() if dim == dim_out else Conv2dNHWC(dim, dim_out, 1, **dd)

    def shortcut(self, x):
        if self.stride > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, self.stride, padding=1, count_include_pad=False)
            x = x.permute(0, 2, 3, 1)
        return self.expand(x)

    def forward(self, x):
        y = F.gelu(self.conv2(F.gelu(self.conv1(self.norm(x)))))
        return self.conv3(y) + self.shortcut(x)


class NormConv(nn.Module):
    """LayerNorm and a 3x3 convolution of stride 2."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = _layer_norm(dim, **dd)
        self.proj = Conv2dNHWC(dim, dim_out, 3, 2, padding=1, **dd)

    def forward(self, x):
        return self.proj(self.norm(x))


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class MapBlock(RWKVBlock):
    """A block of Vision-RWKV on a map ``(B, H, W, C)``; its channel mixer has twice the width."""

    def __init__(
        self, dim: int, layer: int, layers: int, init_values: float, drop_path: float, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        mixers = SpatialMix(dim, layer, layers, **dd), ChannelMix(dim, 2 * dim, layer, layers, **dd)
        super().__init__(dim, *mixers, init_values=init_values, eps=1e-6, drop_path=drop_path, **dd)

    def forward(self, x):
        grid = x.shape[1:3]
        return super().forward(x.flatten(1, 2), grid).unflatten(1, grid)


class RWKVSAMBackbone(Pyramid):
    """RWKV-SAM's backbone. Its features have strides 4, 8, 16 and 16. The third is taken between the RWKV blocks, not
    normalised; the fourth after the final norm.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dims: Widths at strides 4, 8 and 16.
        depths: MBConvs at strides 4 and 8; RWKV blocks up to the third feature map and after it.
        init_values: Initial layer scales.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first RWKV block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (32, 64, 192),
        depths: tuple[int, ...] = (2, 4, 8, 6),
        init_values: float = 1e-2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        fine, middle, coarse = dims
        super().__init__((*dims, coarse), 4, in_chans, num_classes, drop_rate)
        self.feature_info[-1]["reduction"] = 16
        layers = depths[2] + depths[3]
        rates = calculate_drop_path_rates(drop_path_rate, layers)
        blocks = [MapBlock(coarse, i, layers, init_values, rates[i], **dd) for i in range(layers)]
        self.stem = Stem(in_chans, fine, **dd)
        self.stages = nn.Sequential(
            Stage([MBConv(fine, fine, 1 if i else 2, **dd) for i in range(depths[0])]),
            Stage([MBConv(middle if i else fine, middle, 1 if i else 2, **dd) for i in range(depths[1])]),
            Stage(blocks[: depths[2]], NormConv(middle, coarse, **dd)),
            Stage(blocks[depths[2] :], norm=_layer_norm(coarse, **dd)),
        )
        self.norm = nn.Identity()  # it is in the last stage, so the segmenter gets a normalised last map
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self):
        """The decays and bonuses of the WKV: matrices here, but vectors in the published recipe."""
        return {name for name, _ in self.named_parameters() if name.endswith((".decay", ".bonus"))}


_RENAMES = [
    (r"^conv_stages\.(\d)\.", r"stages.\1.blocks."),
    (r"\.pre_norm\.", ".norm."),
    (r"\.conv(\d)_(?:1x1|kxk)\.", r".conv\1."),
    (r"\.shortcut\.expand\.", ".expand."),
    (r"^conv_final_pool\.", "stages.2.downsample."),
    (r"^final_norm\.", "stages.3.norm."),
    (r"\.layer_scale_([12])$", r".ls\1.gamma"),
    (r"\.attn\.", ".mixer."),
    *RWKV_NAMES,
]


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict of a classifier, or the backbone's part of a segmenter's, to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stages.3.norm.weight" in state_dict:
        return state_dict
    split = len(model.stages[2].blocks)

    def block(match):
        i = int(match[1])
        return f"stages.{2 + (i >= split)}.blocks.{i - split * (i >= split)}."

    renames = [(r"^layers\.(\d+)\.", block), *_RENAMES]
    ours = {key.removeprefix("backbone."): t for key, t in state_dict.items() if key.startswith(("backbone.", "head."))}
    ours = stack_mixes(ours, ["spatial_mix_k", "spatial_mix_v", "spatial_mix_r"])
    ours = stack_mixes(ours, ["spatial_mix_k", "spatial_mix_r"])
    return reshape_as({rename(key, renames): value for key, value in ours.items()}, model)


def _cfg(**kwargs):
    return imagenet_cfg(
        pool_size=(14, 14),
        first_conv="stem.conv1",
        classifier="head.fc",
        origin_url="https://github.com/HarborYuan/ovsam",
        paper_ids="arXiv:2406.19369",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"rwkvsam_backbone_{size}.in1k": _cfg() for size in "tsbl"})


def _create_rwkvsam_backbone(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        RWKVSAMBackbone,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def rwkvsam_backbone_t(pretrained=False, **kwargs):
    """RWKV-SAM's backbone, tiny."""
    return _create_rwkvsam_backbone("rwkvsam_backbone_t", pretrained, **kwargs)


@register_model
def rwkvsam_backbone_s(pretrained=False, **kwargs):
    """RWKV-SAM's backbone, small."""
    return _create_rwkvsam_backbone("rwkvsam_backbone_s", pretrained, **dict(dict(dims=(64, 128, 384)), **kwargs))


@register_model
def rwkvsam_backbone_b(pretrained=False, **kwargs):
    """RWKV-SAM's backbone, base."""
    return _create_rwkvsam_backbone("rwkvsam_backbone_b", pretrained, **dict(dict(dims=(128, 256, 768)), **kwargs))


@register_model
def rwkvsam_backbone_l(pretrained=False, **kwargs):
    """RWKV-SAM's backbone, large."""
    return _create_rwkvsam_backbone("rwkvsam_backbone_l", pretrained, **dict(dict(dims=(160, 320, 1024)), **kwargs))
