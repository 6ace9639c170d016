"""VSSD.

Paper: VSSD: Vision Mamba with Non-Causal State Space Duality - https://arxiv.org/abs/2407.18559

A four-stage pyramid built like MLLA. Three stages mix tokens with non-causal state-space duality: all tokens write to
one state, with positive weights that depend on them, and all read it. The last stage uses softmax attention.

Maps are channel-last (B, H, W, C) throughout.
"""

import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import NCSSD, Pyramid, Stage
from .layers.checkpoint import rename, unwrap_state_dict
from .layers.mlla import MLLA_NAMES, MLLABlock, MLLADownsample, MLLAStem, mlla_downsample_name
from .layers.pretrained import imagenet_cfg

__all__ = ["VSSD"]


class Attention(nn.Module):
    """Softmax attention among all tokens of the map ``(B, H, W, C)``."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2).view(x.shape))


class VSSD(Pyramid):
    """VSSD (arXiv 2407.18559).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        d_state: N of the non-causal state-space duality.
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
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        d_state: int = 64,
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
            last = i == len(dims) - 1
            blocks = [
                MLLABlock(
                    dim,
                    Attention(dim, num_heads[i], **dd) if last else NCSSD(dim, num_heads[i], d_state, **dd),
                    drop_path=rate,
                    **dd,
                )
                for rate in drop_path[i]
            ]
            stages.append(Stage(blocks, MLLADownsample(dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


# Published names of the mixers, and ours.
_RENAMES = [
    *MLLA_NAMES,
    (r"\.attn\.conv2d\.", ".mixer.conv."),
    (r"\.attn\.to_qkv\.", ".mixer.qkv."),
    (r"\.attn\.to_out\.", ".mixer.proj."),
    (r"\.attn\.", ".mixer."),
]


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.conv1.conv.weight" in state_dict:
        return state_dict
    return {rename(mlla_downsample_name(key), _RENAMES): value for key, value in state_dict.items()}


def _cfg(**kwargs):
    return imagenet_cfg(
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        origin_url="https://github.com/YuHengsss/VSSD",
        paper_ids="arXiv:2407.18559",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg() for name in ("vssd_m", "vssd_t", "vssd_s", "vssd_b")})


def _create_vssd(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        VSSD,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def vssd_m(pretrained=False, **kwargs):
    """VSSD-Micro."""
    model_args = dict(dim=48, depths=(2, 2, 8, 4), d_state=48)
    return _create_vssd("vssd_m", pretrained, **dict(model_args, **kwargs))


@register_model
def vssd_t(pretrained=False, **kwargs):
    """VSSD-Tiny."""
    model_args = dict(dim=64, depths=(2, 4, 8, 4))
    return _create_vssd("vssd_t", pretrained, **dict(model_args, **kwargs))


@register_model
def vssd_s(pretrained=False, **kwargs):
    """VSSD-Small."""
    model_args = dict(dim=64, depths=(3, 4, 21, 5))
    return _create_vssd("vssd_s", pretrained, **dict(model_args, **kwargs))


@register_model
def vssd_b(pretrained=False, **kwargs):
    """VSSD-Base."""
    model_args = dict(dim=96, depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24))
    return _create_vssd("vssd_b", pretrained, **dict(model_args, **kwargs))
