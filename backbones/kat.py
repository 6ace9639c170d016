"""KAT (Kolmogorov-Arnold Transformer).

Papers: Kolmogorov-Arnold Transformer (ICLR 2025) - https://arxiv.org/abs/2409.10594
FlashKAT: Understanding and Addressing Performance Bottlenecks in the Kolmogorov-Arnold Transformer (AAAI 2026)
- https://arxiv.org/abs/2505.13813

timm's ViT with a group-rational KAN instead of the MLP. It uses softmax attention, which is quadratic in tokens.
"""

import re

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_function
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn

from .layers import GRKAN, unwrap_state_dict
from .layers.pretrained import imagenet_cfg
from .layers.script import refuse_script

__all__ = ["KAT"]

register_notrace_function(resample_abs_pos_embed)  # FX cannot trace what depends on the image's size


def mimetic_factors(width, rank, scale, sign, device=None):
    """Factors L ``(width, rank)``, R ``(rank, width)`` of ``scale (U + sign I)``, U uniform of variance 1 / width."""
    bound = (3 / width) ** 0.5
    noise = torch.empty(width, width, device=device).uniform_(-bound, bound)
    U, S, Vh = torch.linalg.svd(scale * (noise + sign * torch.eye(width, device=device)))
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


class KAT(VisionTransformer):
    """timm's VisionTransformer with `GRKAN` as MLP.

    Images of another size are padded to whole patches; positions are interpolated for them.

    Args:
        weight_init: As in timm; or 'mimetic', the published runs' attention (arXiv 2305.09828): query and key start so
            that tokens attend to themselves, value and projection so that they subtract a part of their input. It
            costs a singular value decomposition per head. The KANs always start so that they keep the variance.
        kwargs: Everything else, as in timm.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, weight_init: str = "", **kwargs):
        self.mimetic = weight_init == "mimetic"
        kwargs = {"mlp_layer": GRKAN, "dynamic_img_size": True, "dynamic_img_pad": True, **kwargs}
        super().__init__(weight_init="" if self.mimetic else weight_init, **kwargs)

    @torch.no_grad()
    def init_weights(self, mode="", needs_reset=True):
        super().init_weights(mode, needs_reset)
        for block in self.blocks:
            if isinstance(block.mlp, GRKAN):
                block.mlp.keep_variance()
            if self.mimetic:
                self.init_attention(block.attn)

    def _pos_embed(self, x):
        if (
            not isinstance(x, torch.fx.Proxy) and x.shape[0] == 0
        ):  # timm infers a size from the elements, but there are none
            return super()._pos_embed(x.new_zeros(1, *x.shape[1:]))[:0]
        return super()._pos_embed(x)

    @torch.jit.ignore
    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}

    def init_attention(self, attn):
        """Mimetic initialisation of one attention layer."""
        width, heads, device = self.embed_dim, attn.num_heads, attn.qkv.weight.device
        pairs = [mimetic_factors(width, width // heads, 0.7, 1, device) for _ in range(heads)]
        value, proj = mimetic_factors(width, width, 0.4, -1, device)
        attn.qkv.weight.copy_(torch.cat([*(L.t() for L, _ in pairs), *(R for _, R in pairs), value]))
        attn.proj.weight.copy_(proj)


def checkpoint_filter_fn(state_dict, model):
    """Converts a published state dict (KAT's or FlashKAT's), or that of a timm ViT; its KANs then start anew."""
    state_dict = unwrap_state_dict(state_dict)
    out = {}
    for key, value in state_dict.items():
        key = re.sub(r"\.(weight_numerator|numerator_v)$", ".numerator", key)
        out[re.sub(r"\.(weight_denominator|denominator_v)$", ".denominator", key)] = value
    if not any(key.endswith(".numerator") for key in out):
        out |= {k: v for k, v in model.state_dict().items() if k.endswith((".numerator", ".denominator"))}
    return vit_checkpoint_filter_fn(out, model)


def _cfg(url="", **kwargs):
    return imagenet_cfg(
        url=url,
        pool_size=None,
        min_input_size=(3, 16, 16),
        first_conv="patch_embed.proj",
        classifier="head",
        license="mit",
        origin_url="https://github.com/Adamdad/kat",
        paper_ids="arXiv:2409.10594",
        **kwargs,
    )


_RELEASE = "https://github.com/Adamdad/kat/releases/download/checkpoint/"
_HUB = "https://huggingface.co/adamdad/kat_pretained/resolve/main/"

default_cfgs = generate_default_cfgs(
    {
        "kat_tiny_patch16_224.in1k": _cfg(
            _RELEASE + "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth"
        ),
        "kat_tiny_patch16_224.vit_ft_in1k": _cfg(
            _RELEASE
            + "kat_tiny_patch16_224-finetune_64f124d003803e4a7e1aba1ba23500ace359b544e8a5f0110993f25052e402fb.pth"
        ),
        "kat_small_patch16_224.in1k": _cfg(
            _RELEASE + "kat_small_patch16_224_32487885cf13d2c14e461c9016fac8ad43f7c769171f132530941e930aeb5fe2.pth"
        ),
        "kat_small_patch16_224.vit_ft_in1k": _cfg(
            _RELEASE
            + "kat_small_patch_224-finetune_3ae087a4c28e2993468eb377d5151350c52c80b2a70cc48ceec63d1328ba58e0.pth"
        ),
        "kat_base_patch16_224.in1k": _cfg(
            _RELEASE + "kat_base_patch16_224_abff874d925d756d15cde97303f772a3460ddbd44b9c53fb9ce5cf15be230fb6.pth"
        ),
        "kat_base_patch16_224.vit_ft_in1k": _cfg(
            _HUB + "kat_base_patch16_224-finetune_440bf1ead9dd8ecab642078cfb60ae542f1fa33ca65517260501e02c011e38f2.pth"
        ),
    }
)


def _create_kat(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        KAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


@register_model
def kat_tiny_patch16_224(pretrained=False, **kwargs):
    """KAT-T."""
    model_args = dict(embed_dim=192, depth=12, num_heads=3)
    return _create_kat("kat_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def kat_small_patch16_224(pretrained=False, **kwargs):
    """KAT-S."""
    model_args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create_kat("kat_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def kat_base_patch16_224(pretrained=False, **kwargs):
    """KAT-B."""
    model_args = dict(embed_dim=768, depth=12, num_heads=12)
    return _create_kat("kat_base_patch16_224", pretrained, **dict(model_args, **kwargs))
