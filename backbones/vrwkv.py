"""Vision-RWKV and its RWKV-6 version.

Paper: Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures (ICLR 2025)
- https://arxiv.org/abs/2403.02308

Patch tokens with learned positions, and blocks of a token mixer and a gated channel mixer. Each of them first mixes
every token with its four neighbours. Vision-RWKV mixes by bidirectional means whose weights fall with the distance
(BiWKV), Vision-RWKV-6 by matrix states with data-dependent decay, scanned forwards and backwards.
"""

import math

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import ChannelMix, Isotropic, RWKVBlock, SpatialMix, SpatialMix6, resize_pos_embed, unwrap_state_dict
from .layers.checkpoint import rename, reshape_as
from .layers.pretrained import imagenet_cfg
from .layers.rwkv import RWKV_NAMES, stack_mixes
from .layers.state_tuning import load_states, save_states, tune_states

__all__ = ["VRWKV", "VRWKV6"]


class VRWKV(Isotropic):
    """Vision-RWKV (arXiv 2403.02308). Images are padded with 0 on the right and below to whole patches.

    Args:
        img_size: Height and width (or one side) of images that fit the position table; interpolated for other sizes.
        patch_size: Side of a patch.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`, without 'token'.
        dim: Width.
        depth: Blocks.
        post_norm: Normalise the outputs of the mixers instead of their inputs.
        init_values: Initial layer scales; None for none.
        inner_norm: Use LayerNorms inside the mixers, as the large model does.
        head_hidden: Width of a layer with tanh before the classifier; None for none.
        state_tuning: Call `state_tuning` at the end.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    pad_patches = True
    antialias_pos_embed = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 192,
        depth: int = 12,
        post_norm: bool = False,
        init_values: float | None = None,
        inner_norm: bool = False,
        head_hidden: int | None = None,
        state_tuning: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(
            img_size,
            patch_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            dim,
            depth,
            class_token=False,
            drop_rate=drop_rate,
            **dd,
        )
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        norms = dict(post_norm=post_norm, init_values=init_values)
        self.blocks = nn.ModuleList(
            RWKVBlock(
                dim, *self.mixers(dim, i, depth, inner_norm, **dd), first_norm=i == 0, drop_path=rates[i], **norms, **dd
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        if head_hidden:
            self.pre_head_size = head_hidden
            self.pre_head = nn.Sequential(nn.Linear(dim, head_hidden, **dd), nn.Tanh())
            self.reset_classifier(num_classes)
        self.init_weights(needs_reset=False)
        if state_tuning:
            self.state_tuning()

    def state_tuning(self, head: bool = True) -> None:
        """From now on only the initial states of the scans are trained and, with `head`, the classifier.

        `save_states` writes these few numbers to a file, and `load_states` reads them; see
        `linzoo.backbones.layers.state_tuning`.

        Raises:
            ValueError: the model mixes tokens by BiWKV, which has no matrix states.
        """
        tune_states(self, head)

    def save_states(self, path) -> None:
        """Writes the parameters that `state_tuning` trains."""
        save_states(self, path)

    def load_states(self, states) -> None:
        """Reads the output of `save_states`: a file or a state dict."""
        load_states(self, states)

    @staticmethod
    def mixers(dim, layer, layers, inner_norm, device=None, dtype=None):
        """Token and channel mixer of a block."""
        dd: dict = {"device": device, "dtype": dtype}
        spatial = SpatialMix(dim, layer, layers, out_norm=inner_norm, **dd)
        return spatial, ChannelMix(dim, None, layer, layers, hidden_norm=inner_norm, **dd)

    def init_weights(self, needs_reset=True):
        super().init_weights(needs_reset)
        nn.init.zeros_(self.pos_embed)

    @staticmethod
    def _init_weights(module, needs_reset=False):
        Isotropic._init_weights(module, needs_reset)
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self):
        """Only vectors: the published recipe also decays positions."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        return dict(
            stem=r"^pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^(?:norm|pre_head)", (99999,))],
        )

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        if prune_head:
            self.pre_head, self.pre_head_size = nn.Identity(), self.num_features
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)


class VRWKV6(VRWKV):
    """Vision-RWKV with RWKV-6's token mixer: `VRWKV` without `inner_norm`; its width is a multiple of 64."""

    @staticmethod
    def mixers(dim, layer, layers, inner_norm, device=None, dtype=None):
        if inner_norm:
            raise ValueError("inner_norm: Vision-RWKV-6 has none, got True")
        dd: dict = {"device": device, "dtype": dtype}
        spatial = SpatialMix6(dim, layer, layers, **dd)
        return spatial, ChannelMix(dim, None, layer, layers, heads=spatial.heads, **dd)


_RENAMES = [
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed."),
    (r"^ln1\.", "norm."),
    (r"^head\.(?:fc|2)\.", "head."),
    (r"^head\.0\.", "pre_head.0."),
    (r"^layers\.", "blocks."),
    *RWKV_NAMES,
    (r"\.mixer\.ln_x\.", ".mixer.norm."),
    (r"\.time_decay(?=$|_w)", ".decay"),
    (r"\.time_faaaa$", ".bonus"),
    (r"\.time_maa_(?=x$|w[12]$)", ".mix_"),
]


def checkpoint_filter_fn(state_dict, model):
    """Converts a published state dict to ours, and the position table to the model's grid."""
    state_dict = unwrap_state_dict(state_dict)
    out = {rename(key, _RENAMES): value for key, value in state_dict.items()}
    for names in (("spatial_mix_k", "spatial_mix_v", "spatial_mix_r"), ("spatial_mix_k", "spatial_mix_r")):
        out = stack_mixes(out, names)
    out = stack_mixes(out, [f"time_maa_{name}" for name in "wkvrg"])
    table = out.get("pos_embed")
    if table is not None and table.shape != model.pos_embed.shape:
        side = math.isqrt(table.shape[1])
        out["pos_embed"] = resize_pos_embed(table, (side, side), model.grid_size, False, model.antialias_pos_embed)
    for key, value in model.state_dict().items():
        if key.endswith(".time_state"):  # weights from before the tuning do not have it
            out.setdefault(key, torch.zeros(value.shape))
    return reshape_as(out, model)


def vrwkv_cfg(**kwargs):
    """timm's pretrained configuration; `kwargs` replace entries that differ."""
    cfg = dict(
        pool_size=None,
        min_input_size=(3, 16, 16),
        first_conv="patch_embed",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/OpenGVLab/Vision-RWKV",
        paper_ids="arXiv:2403.02308",
    )
    return imagenet_cfg(**{**cfg, **kwargs})


HUB = "https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/"

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": vrwkv_cfg(url=f"{HUB}{name}_in1k_224.pth")
        for name in ("vrwkv_t", "vrwkv_s", "vrwkv_b", "vrwkv6_t", "vrwkv6_s", "vrwkv6_b")
    }
    | {
        "vrwkv_l.in22k_ft_in1k_384": vrwkv_cfg(
            url=f"{HUB}vrwkv_l_22kto1k_384.pth", input_size=(3, 384, 384), crop_pct=1.0
        )
    }
)


def _create_vrwkv(variant, pretrained=False, model_cls=VRWKV, **kwargs):
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(2, 5, 8, 11), feature_cls="getter"),
        **kwargs,
    )


@register_model
def vrwkv_t(pretrained=False, **kwargs):
    """Vision-RWKV-T."""
    return _create_vrwkv("vrwkv_t", pretrained, **dict(dict(dim=192), **kwargs))


@register_model
def vrwkv_s(pretrained=False, **kwargs):
    """Vision-RWKV-S."""
    model_args = dict(dim=384, post_norm=True, init_values=1.0)
    return _create_vrwkv("vrwkv_s", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv_b(pretrained=False, **kwargs):
    """Vision-RWKV-B."""
    model_args = dict(dim=768, post_norm=True, init_values=1e-5)
    return _create_vrwkv("vrwkv_b", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv_l(pretrained=False, **kwargs):
    """Vision-RWKV-L, with positions for 192 px."""
    model_args = dict(
        img_size=192, dim=1024, depth=24, post_norm=True, init_values=1e-5, inner_norm=True, head_hidden=3072
    )
    return _create_vrwkv("vrwkv_l", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv6_t(pretrained=False, **kwargs):
    """Vision-RWKV-6-T."""
    return _create_vrwkv("vrwkv6_t", pretrained, VRWKV6, **dict(dict(dim=192), **kwargs))


@register_model
def vrwkv6_s(pretrained=False, **kwargs):
    """Vision-RWKV-6-S."""
    model_args = dict(dim=384, post_norm=True, init_values=1e-5)
    return _create_vrwkv("vrwkv6_s", pretrained, VRWKV6, **dict(model_args, **kwargs))


@register_model
def vrwkv6_b(pretrained=False, **kwargs):
    """Vision-RWKV-6-B."""
    model_args = dict(dim=768, post_norm=True, init_values=1e-5)
    return _create_vrwkv("vrwkv6_b", pretrained, VRWKV6, **dict(model_args, **kwargs))
