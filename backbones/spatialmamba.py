"""Spatial-Mamba.

Paper: Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion (ICLR 2025)
- https://arxiv.org/abs/2410.15091

A four-stage pyramid built like MLLA. One selective scan runs in raster order, with one state per channel. Three dilated
depthwise convolutions fuse the states, seen as a map, over space before they are read out.

Maps are channel-last (B, H, W, C) throughout.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import depthwise_conv2d, selective_states

from .layers import S6, Conv2dNHWC, Pyramid, Stage
from .layers.checkpoint import SS2D_NAMES, rename, reshape_as, unwrap_state_dict
from .layers.mlla import MLLA_NAMES, MLLABlock, MLLADownsample, MLLAStem, mlla_downsample_name
from .layers.pretrained import imagenet_cfg

__all__ = ["SpatialMamba"]


class StateFusion(nn.Module):
    """Structure-aware state fusion: ``sum_k alpha_k DWConv_k(h)`` with 3x3 kernels of dilation 1, 3 and 5.

    Borders are replicated. `fuse` merges the kernels into one of 11x11: 121 taps instead of 27, but one pass over the
    map, which is faster for large maps.
    """

    dilations = (1, 3, 5)

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(len(self.dilations), dim, 3, 3, **dd))
        self.alpha = nn.Parameter(torch.empty(len(self.dilations), **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.kernels)
        nn.init.ones_(self.alpha)

    def forward(self, h):
        """States ``(B, H, W, C)`` to the same."""
        height, width, border = h.shape[1], h.shape[2], max(self.dilations)
        padded = F.pad(h.permute(0, 3, 1, 2), (border,) * 4, mode="replicate").permute(0, 2, 3, 1)
        fused = 0
        for i, d in enumerate(self.dilations):
            inside = padded[:, border - d : border + d + height, border - d : border + d + width]
            fused = fused + depthwise_conv2d(inside, self.alpha[i] * self.kernels[i], dilation=d)
        return fused

    @torch.no_grad()
    def fuse(self):
        """The same as one convolution, with the current values of the kernels."""
        dim, border = self.kernels.shape[1], max(self.dilations)
        dd: dict = {"device": self.kernels.device, "dtype": self.kernels.dtype}
        shape = dict(kernel_size=2 * border + 1, padding=border, padding_mode="replicate", groups=dim, bias=False)
        merged = Conv2dNHWC(dim, dim, **shape, **dd)
        merged.weight.zero_()
        for d, alpha, kernel in zip(self.dilations, self.alpha, self.kernels, strict=True):
            taps = slice(border - d, border + d + 1, d)
            merged.weight[:, 0, taps, taps] += alpha * kernel
        return merged


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class StructureAwareSSM(nn.Module):
    """Selective state-space mixer with state fusion; inner width 2 C, one state per channel.

    ``[x, z] = W_in u;  x = SiLU(DWConv(x));  y = C * fuse(h) + D x;  W_out (LN(y) * SiLU(z))``, where h are the states
    of the selective scan of x in raster order.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner = 2 * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, **dd)
        self.s6 = S6(inner, 1, d_state=1, dt_rank=math.ceil(dim / 16), **dd)
        self.fusion = StateFusion(inner, **dd)
        self.out_norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, u):
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv(x))
        h, C = self.states(x)
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # states grow 27-fold in a new fusion
            y = C * self.fusion(h) + self.s6.D[0] * x
        return self.out_proj(self.out_norm(y.to(self.out_norm.weight.dtype)) * F.silu(z))

    def states(self, x):
        """States of the scan of the map `x` ``(B, H, W, D)``, in the parameters' dtype, and C ``(B, H, W, 1)``."""
        s6 = self.s6
        projected = F.linear(x, s6.x_proj[0])
        dt, B, C = projected.flatten(1, 2).unsqueeze(2).split([s6.dt_rank, 1, 1], dim=-1)
        A = -torch.exp(s6.A_log.to(torch.promote_types(s6.A_log.dtype, torch.float32)))
        wide = x.to(s6.D.dtype).flatten(1, 2).unsqueeze(2)
        h = selective_states(wide, dt, A, B, dt_weight=s6.dt_weight, dt_bias=s6.dt_bias)
        return h.view(*x.shape), C.reshape(*x.shape[:3], 1)


class SpatialMamba(Pyramid):
    """Spatial-Mamba (arXiv 2410.15091).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 8, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        dims = [dim * 2**i for i in range(len(depths))]
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        self.stem = MLLAStem(in_chans, dim, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [MLLABlock(dim, StructureAwareSSM(dim, **dd), drop_path=rate, **dd) for rate in drop_path[i]]
            stages.append(Stage(blocks, MLLADownsample(dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self):
        """The skips D and step biases: matrices here, but vectors in the published recipe."""
        return super().no_weight_decay() | {n for n, _ in self.named_parameters() if n.endswith(".s6.dt_bias")}


_RENAMES = [
    *MLLA_NAMES,
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.state_fusion\.alpha$", ".mixer.fusion.alpha"),
    (r"\.self_attention\.", ".op."),
    *SS2D_NAMES,
]
_KERNELS = ("kernel_3", "kernel_3_1", "kernel_3_2")  # of dilation 1, 3, 5


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.conv1.conv.weight" in state_dict:
        return state_dict
    out = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        if name == _KERNELS[0]:
            prefix = prefix.replace(".self_attention.state_fusion", ".mixer.fusion").replace("layers.", "stages.")
            parts = [state_dict[key.removesuffix(name) + kernel] for kernel in _KERNELS]
            out[f"{prefix}.kernels"] = torch.stack(parts).squeeze(2)
        elif name not in _KERNELS:
            out[rename(mlla_downsample_name(key), _RENAMES)] = value
    return reshape_as(out, model)


def _cfg(**kwargs):
    return imagenet_cfg(
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        license="apache-2.0",
        origin_url="https://github.com/EdwardChasel/Spatial-Mamba",
        paper_ids="arXiv:2410.15091",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg() for name in ("spatialmamba_t", "spatialmamba_s", "spatialmamba_b")}
)


def _create_spatialmamba(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        SpatialMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def spatialmamba_t(pretrained=False, **kwargs):
    """Spatial-Mamba-T."""
    model_args = dict(dim=64, depths=(2, 4, 8, 4))
    return _create_spatialmamba("spatialmamba_t", pretrained, **dict(model_args, **kwargs))


@register_model
def spatialmamba_s(pretrained=False, **kwargs):
    """Spatial-Mamba-S."""
    model_args = dict(dim=64, depths=(2, 4, 21, 5))
    return _create_spatialmamba("spatialmamba_s", pretrained, **dict(model_args, **kwargs))


@register_model
def spatialmamba_b(pretrained=False, **kwargs):
    """Spatial-Mamba-B."""
    model_args = dict(dim=96, depths=(2, 4, 21, 5))
    return _create_spatialmamba("spatialmamba_b", pretrained, **dict(model_args, **kwargs))
