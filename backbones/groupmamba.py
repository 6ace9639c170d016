"""GroupMamba.

Paper: GroupMamba: Efficient Group-Based Visual State Space Model (CVPR 2025) - https://arxiv.org/abs/2407.13772

A four-stage pyramid whose token mixer splits the channels into four groups. Each group has its own gated selective
scan, which walks the image in one of four directions. A channel affinity, computed from the mixer's input, couples the
groups again.

Tokens are channel-last maps (B, H, W, C) throughout.
"""

import math
import re

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import scan_order

from .layers import (
    S6,
    Conv2dNHWC,
    ConvDownsample,
    GroupedLayerNorm,
    GroupedLinear,
    Pyramid,
    Stage,
    channel_mixer,
    unwrap_state_dict,
)
from .layers.pretrained import imagenet_cfg

__all__ = ["GroupMamba"]

GROUPS = 4


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class GatedGroupScan(nn.Module):
    """M_g for all four groups: gated selective scans, each in its own direction.

    ``[p, q] = W_in v;  y = LN(S6(SiLU(DWConv(p))));  W_out (y * SiLU(q))``
    """

    def __init__(self, dim: int, d_state: int = 1, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        width = dim // GROUPS
        self.in_proj = GroupedLinear(GROUPS, width, 2 * width, **dd)
        self.conv = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.s6 = S6(width, GROUPS, d_state, **dd)
        self.out_norm = GroupedLayerNorm(GROUPS, width, **dd)
        self.out_proj = GroupedLinear(GROUPS, width, width, **dd)

    def forward(self, x):
        B, H, W, C = x.shape
        p, q = self.in_proj(x.view(B, H * W, GROUPS, C // GROUPS)).chunk(2, dim=-1)
        p = F.silu(self.conv(p.reshape(B, H, W, C)))
        y = self.s6(p.reshape(B, H * W, GROUPS, C // GROUPS), order=scan_order.cross(H, W, device=x.device))
        return self.out_proj(self.out_norm(y) * F.silu(q)).reshape(B, H, W, C)


class ChannelAffinity(nn.Module):
    """Channel affinity modulation: squeeze and excite of the mixer's normalised input, ``(B, 1, 1, C)``."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 16, **dd)
        self.fc2 = nn.Linear(dim // 16, dim, **dd)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()


class GroupMambaMixer(nn.Module):
    """Modulated group Mamba layer: ``proj(LN(M(u) * skip_scale * u * affinity(u)))`` with ``u = LN(x)``."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.scan = GatedGroupScan(dim, **dd)
        self.skip_scale = nn.Parameter(torch.empty(1, **dd))
        self.affinity = ChannelAffinity(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.skip_scale)

    def forward(self, x):
        u = self.norm(x)
        m = self.scan(u) * u * (self.skip_scale * self.affinity(u))
        return self.proj(self.norm(m))


class DepthwiseMlp(nn.Module):
    """``fc2(GELU(DWConv(fc1(x))))``."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = Conv2dNHWC(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x):
        return self.fc2(F.gelu(self.conv(self.fc1(x))))


class Block(nn.Module):
    def __init__(
        self, dim: int, mlp_ratio: float, mlp: str = "depthwise", drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.mixer = GroupMambaMixer(dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        kind = DepthwiseMlp if mlp == "depthwise" else channel_mixer(mlp)
        self.mlp = kind(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(self.norm(x)))


class ClassBlock(nn.Module):
    """Refines the pooled token ``(B, C)``: the mixer on a map of one token, normalised after it, then an MLP."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.mixer = GroupMambaMixer(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)

    def forward(self, c):
        c = c + self.norm1(self.mixer(c[:, None, None]))[:, 0, 0]
        return c + self.mlp(self.norm2(c))


class Stem(nn.Module):
    """Four convolutions, stride 4 in all, and a LayerNorm: an image ``(B, 3, H, W)`` to tokens ``(B, H/4, W/4, C)``."""

    def __init__(self, in_chans: int, width: int, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        convs = []
        for i, chans in enumerate((in_chans, width, width)):
            size, stride = (7, 2) if i == 0 else (3, 1)
            convs += [
                nn.Conv2d(chans, width, size, stride, padding=size // 2, bias=False, **dd),
                nn.BatchNorm2d(width, **dd),
                nn.ReLU(),
            ]
        self.convs = nn.Sequential(*convs, nn.Conv2d(width, dim, 3, 2, padding=1, **dd))
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x):
        return self.norm(self.convs(x).permute(0, 2, 3, 1))


class GroupMamba(Pyramid):
    """GroupMamba (arXiv 2407.13772).

    Every stage except the last ends in a LayerNorm; the next stage reads its output. The final norm belongs to the
    class token: `forward_features` returns the last map without it. Dense predictors apply it (``norm=True``).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the class block, which takes only a pooled token; '' for none.
        stem_width: Channels inside the stem.
        dims: Channels of each stage, multiples of 4.
        depths: Blocks of each stage.
        mlp_ratios: Hidden over outer width of each stage's MLPs.
        mlp: The MLP of the stages: 'depthwise' (with a convolution in it, as published) or a name from
            `layers.channel_mixer`: 'mlp', 'grkan', 'bspline_kan', 'fourier_kan'.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
        distillation: Whether a second head learns from a teacher. Its output is averaged with the first head's, except
            in training with `set_distilled_training` on: then `forward` returns both.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_width: int = 32,
        dims: tuple[int, ...] = (64, 128, 348, 448),
        depths: tuple[int, ...] = (3, 4, 9, 3),
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        mlp: str = "depthwise",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distillation: bool = True,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        if any(dim % GROUPS for dim in dims):
            raise ValueError(f"dims: every stage's width must be a multiple of {GROUPS}, got {tuple(dims)}")
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        self.distillation = distillation
        self.distilled_training = False

        self.stem = Stem(in_chans, stem_width, dims[0], **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [Block(dim, mlp_ratios[i], mlp, rate, **dd) for rate in drop_path[i]]
            downsample = ConvDownsample(dims[i - 1], dim, **dd) if i else None
            norm = nn.LayerNorm(dim, eps=1e-6, **dd) if i < len(dims) - 1 else None
            stages.append(Stage(blocks, downsample, norm))
        self.stages = nn.Sequential(*stages)

        self._set_pool(global_pool)
        self.class_block = ClassBlock(dims[-1], **dd)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes, **dd)
        self.head_dist = self._classifier(num_classes, **dd) if distillation else None
        self.init_weights(needs_reset=False)

    def _set_pool(self, global_pool):
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt="NHWC")
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _classifier(self, num_classes, **dd):
        return nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @staticmethod
    def _init_weights(module, needs_reset=False):
        if isinstance(module, GroupedLinear):
            trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / (height * width * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            Pyramid._init_weights(module, needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self):
        """The skips D and the weights of the groups' norms: matrices here, but vectors in the published recipe."""
        norms = {name for name, _ in self.named_parameters() if name.endswith(".out_norm.weight")}
        return super().no_weight_decay() | norms

    @torch.jit.ignore
    def set_distilled_training(self, enable=True):
        """Sets whether `forward` returns ``(logits, distillation logits)`` in training."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self):
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes, global_pool=None):
        """Replaces the classifiers; `global_pool` None keeps the pooling."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        self.head = self._classifier(num_classes, **dd).train(self.training)
        if self.head_dist is not None:
            self.head_dist = self._classifier(num_classes, **dd).train(self.training)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or isinstance(self.norm, nn.Identity):
            self.class_block = nn.Identity()
        return take_indices

    def final_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        x = self.global_pool(x)
        if self.global_pool.is_identity():
            x = self.norm(x)
        else:  # one token per kind of pooling, one after the other
            x = self.norm(self.class_block(x.unflatten(-1, (-1, self.num_features)).flatten(0, 1))).reshape(x.shape)
        x = self.head_drop(x)
        if pre_logits:
            return x
        if self.head_dist is None:
            return self.head(x)
        logits, distilled = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return logits, distilled
        return (logits + distilled) / 2


# Keys of a mixer in the published state dict, besides its four `mamba_g{1..4}`.
_MIXER_KEYS = {"fc1": "affinity.fc1", "fc2": "affinity.fc2"}
# Keys of one group, and ours for all four stacked; x_proj and dt_projs_* lose the leading 1.
_GROUP_KEYS = {
    "in_proj.weight": "in_proj.weight",
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "x_proj_weight": "s6.x_proj",
    "dt_projs_weight": "s6.dt_weight",
    "dt_projs_bias": "s6.dt_bias",
    "A_logs": "s6.A_log",
    "Ds": "s6.D",
    "out_norm.weight": "out_norm.weight",
    "out_norm.bias": "out_norm.bias",
    "out_proj.weight": "out_proj.weight",
}


def _convert_key(key):
    key = re.sub(r"^patch_embed1\.conv\.(\d+)", r"stem.convs.\1", key)
    key = key.replace("patch_embed1.proj", "stem.convs.9").replace("patch_embed1.norm", "stem.norm")
    key = re.sub(r"^patch_embed(\d)\.proj", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv", key)
    key = re.sub(r"^patch_embed(\d)\.norm", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm", key)
    key = re.sub(r"^block(\d)\.(\d+)\.norm2", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.norm", key)
    key = re.sub(r"^block(\d)\.(\d+)", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}", key)
    key = re.sub(r"^norm([123])\.", lambda m: f"stages.{int(m[1]) - 1}.norm.", key)
    key = re.sub(r"^norm4\.", "norm.", key)
    key = key.replace("post_network.0.", "class_block.").replace("mlp.dwconv.dwconv.", "mlp.conv.")
    key = re.sub(r"\.attn\.(fc1|fc2)\.", lambda m: f".mixer.{_MIXER_KEYS[m[1]]}.", key)
    return key.replace(".attn.", ".mixer.").replace("dist_head.", "head_dist.")


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "patch_embed1.proj.weight" not in state_dict:
        return state_dict
    out, groups = {}, {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(.*\.attn)\.mamba_g(\d)\.(.*)", key)
        if match is None:
            out[_convert_key(key)] = value
        else:
            name = _convert_key(match[1] + ".scan.") + _GROUP_KEYS[match[3]]
            groups.setdefault(name, {})[int(match[2])] = value
    for name, parts in groups.items():
        parts = [parts[g] for g in sorted(parts)]
        joined = ".conv." in name or name.endswith(("x_proj", "dt_weight", "dt_bias"))
        out[name] = torch.cat(parts) if joined else torch.stack(parts)
    if model.head_dist is None:
        out = {k: v for k, v in out.items() if not k.startswith("head_dist.")}
    return out


def _cfg(**kwargs):
    return imagenet_cfg(
        first_conv="stem.convs.0",
        classifier=("head", "head_dist"),
        license="mit",
        origin_url="https://github.com/Amshaker/GroupMamba",
        paper_ids="arXiv:2407.13772",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "groupmamba_t.in1k": _cfg(),
        "groupmamba_s.in1k": _cfg(),
        "groupmamba_b.in1k": _cfg(),
    }
)


def _create_groupmamba(variant, pretrained=False, **kwargs):
    feature_cfg = dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True)
    if kwargs.get("feature_cls", "getter") == "getter":  # timm's other extractors return stages as they are
        feature_cfg["norm"] = True
    return build_model_with_cfg(
        GroupMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_model
def groupmamba_t(pretrained=False, **kwargs):
    """GroupMamba-Tiny: 23.4M parameters, 4.6 GMACs."""
    model_args = dict(stem_width=32, dims=(64, 128, 348, 448), depths=(3, 4, 9, 3))
    return _create_groupmamba("groupmamba_t", pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_s(pretrained=False, **kwargs):
    """GroupMamba-Small: 34.8M parameters, 7.0 GMACs."""
    model_args = dict(stem_width=64, dims=(64, 128, 348, 512), depths=(3, 4, 16, 3))
    return _create_groupmamba("groupmamba_s", pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_b(pretrained=False, **kwargs):
    """GroupMamba-Base: 57.2M parameters, 14 GMACs."""
    model_args = dict(stem_width=64, dims=(96, 192, 424, 512), depths=(3, 6, 21, 3))
    return _create_groupmamba("groupmamba_b", pretrained, **dict(model_args, **kwargs))
