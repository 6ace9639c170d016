"""Vim (Vision Mamba).

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model (ICML 2024)
- https://arxiv.org/abs/2401.09417

Patch tokens, a class token in their middle, and blocks with one mixer each, which scans the tokens in both directions.
"""

import math

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import Isotropic, RMSNorm, VimBlock, unwrap_state_dict
from .layers.checkpoint import stack_directions
from .layers.pretrained import imagenet_cfg

__all__ = ["Vim"]


class Vim(Isotropic):
    """Vim (arXiv 2401.09417).

    Args:
        img_size: Height and width (or one side) of images that fit the position table; interpolated for other sizes.
        patch_size: Side of a patch.
        stride: Step between patches; 8 for the fine-tuned variants.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`.
        dim: Width.
        depth: Blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dim: int = 192,
        depth: int = 24,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(
            img_size, patch_size, stride, in_chans, num_classes, global_pool, dim, depth, True, drop_rate, **dd
        )
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList([VimBlock(dim, rate, **dd) for rate in rates])
        self.norm = RMSNorm(dim, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset=True):
        super().init_weights(needs_reset)
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for block in self.blocks:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(len(self.blocks))
                block.mixer.s6.dt_bias[1] = 0  # as in the published models, whose backward step bias was overwritten

    @torch.jit.ignore
    def no_weight_decay(self):
        """Besides timm's: the skips D and step biases, which are matrices here, but vectors in the published recipe."""
        stacked = {name for name, _ in self.named_parameters() if name.endswith((".s6.D", ".s6.dt_bias"))}
        return super().no_weight_decay() | stacked

    def embed(self, x):
        x, grid = super().embed(x)
        return x.to(torch.promote_types(x.dtype, torch.float32)), grid


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours, and the position table to the model's grid."""
    out = stack_directions(unwrap_state_dict(state_dict))
    out["pos_embed"] = model.fit_positions(out["pos_embed"])
    return out


def _cfg(**kwargs):
    return imagenet_cfg(
        pool_size=None,
        min_input_size=(3, 16, 16),
        first_conv="patch_embed",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/hustvl/Vim",
        paper_ids="arXiv:2401.09417",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "vim_t.in1k": _cfg(),
        "vim_t_stride8.in1k": _cfg(),
        "vim_s.in1k": _cfg(),
        "vim_s_stride8.in1k": _cfg(),
        "vim_b.in1k": _cfg(),
    }
)


def _create_vim(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(5, 11, 17, 23), feature_cls="getter"),
        **kwargs,
    )


@register_model
def vim_t(pretrained=False, **kwargs):
    """Vim-Tiny."""
    return _create_vim("vim_t", pretrained, **dict(dict(dim=192), **kwargs))


@register_model
def vim_t_stride8(pretrained=False, **kwargs):
    """Vim-Tiny fine-tuned on overlapping patches."""
    return _create_vim("vim_t_stride8", pretrained, **dict(dict(dim=192, stride=8), **kwargs))


@register_model
def vim_s(pretrained=False, **kwargs):
    """Vim-Small."""
    return _create_vim("vim_s", pretrained, **dict(dict(dim=384), **kwargs))


@register_model
def vim_s_stride8(pretrained=False, **kwargs):
    """Vim-Small fine-tuned on overlapping patches."""
    return _create_vim("vim_s_stride8", pretrained, **dict(dict(dim=384, stride=8), **kwargs))


@register_model
def vim_b(pretrained=False, **kwargs):
    """Vim-Base."""
    return _create_vim("vim_b", pretrained, **dict(dict(dim=768), **kwargs))
