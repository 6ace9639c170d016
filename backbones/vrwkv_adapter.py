"""Vision-RWKV in ViT-Adapter, for dense prediction: it returns four maps instead of classes.

Papers: Vision-RWKV (ICLR 2025) - https://arxiv.org/abs/2403.02308
Vision Transformer Adapter for Dense Predictions (ICLR 2023) - https://arxiv.org/abs/2205.08534
"""

import re

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .layers import unwrap_state_dict
from .layers.checkpoint import rename
from .layers.vit_adapter import ADAPTER_NAMES, ViTAdapter
from .vrwkv import HUB, VRWKV, vrwkv_cfg
from .vrwkv import checkpoint_filter_fn as vrwkv_checkpoint_filter_fn

__all__ = ["VRWKVAdapter"]


class VRWKVAdapter(ViTAdapter):
    """`ViTAdapter` around a `VRWKV`.

    Args:
        heads: Heads of the deformable attention.
        ratio: Width of its values over the backbone's.
        own_tokens: Add the tokens after block group i to level i, instead of the last tokens to all levels.
        drop_path_rate: Stochastic depth of the last block and of the extractors.
        kwargs: As in `VRWKV`.
    """

    def __init__(
        self,
        heads: int = 6,
        ratio: float = 1.0,
        own_tokens: bool = True,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        backbone = VRWKV(**{**kwargs, "num_classes": 0, "global_pool": ""}, drop_path_rate=drop_path_rate, **dd)
        super().__init__(backbone, heads, ratio, own_tokens, drop_path_rate, **dd)


_ADAPTER = re.compile(r"(?:spm|prior|level_embed|interactions|up|norms?\d?)(?:\.|$)")


def checkpoint_filter_fn(state_dict, model):
    """Converts the authors' state dict of an adapter, with or without a detector or segmenter around it.

    From a classifier it takes the backbone; the adapter then starts from random weights.
    """
    state_dict = {key.removeprefix("backbone."): value for key, value in unwrap_state_dict(state_dict).items()}
    adapter = {rename(key, ADAPTER_NAMES): value for key, value in state_dict.items() if _ADAPTER.match(key)}
    rest = {key: value for key, value in state_dict.items() if not _ADAPTER.match(key)}
    ours = model.state_dict()
    backbone = {f"backbone.{k}": v for k, v in vrwkv_checkpoint_filter_fn(rest, model.backbone).items()}
    backbone = {key: value for key, value in backbone.items() if key in ours}  # no final norm, no classifier
    if "level_embed" not in adapter:  # also layer scales, if the classifier has none
        return {**ours, **backbone}
    return adapter | backbone


def _cfg(size, task):
    name = {"t": "tiny", "s": "small", "b": "base", "l": "large"}[size]
    file = {
        "det": f"mask_rcnn_vrwkv_adapter_{name}_fpn_1x_coco",
        "seg": f"upernet_vrwkv_adapter_{name}_512_160k_ade20k",
    }
    return vrwkv_cfg(
        url=f"{HUB}{file[task]}.pth",
        num_classes=0,
        classifier=None,
        input_size=(3, 512, 512),
        first_conv="backbone.patch_embed",
    )


default_cfgs = generate_default_cfgs(
    {f"vrwkv_{size}_adapter_{task}": _cfg(size, task) for size in "tsbl" for task in ("det", "seg")}
)

# The classifiers' sizes, without layer scales.
_SIZES = {
    "t": dict(dim=192, init_values=1.0, heads=6, ratio=1.0),
    "s": dict(dim=384, post_norm=True, init_values=1e-5, heads=6, ratio=1.0),
    "b": dict(dim=768, post_norm=True, init_values=1e-5, heads=12, ratio=0.5),
    "l": dict(
        img_size=192,
        dim=1024,
        depth=24,
        post_norm=True,
        init_values=1e-5,
        inner_norm=True,
        heads=16,
        ratio=0.5,
    ),
}


def _create(size, task, pretrained=False, **kwargs):
    model_args = dict(_SIZES[size], own_tokens=task == "seg")
    return build_model_with_cfg(
        VRWKVAdapter,
        f"vrwkv_{size}_adapter_{task}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **{**model_args, **kwargs},
    )


@register_model
def vrwkv_t_adapter_det(pretrained=False, **kwargs):
    """Vision-RWKV-T with adapter for detection."""
    return _create("t", "det", pretrained, **kwargs)


@register_model
def vrwkv_t_adapter_seg(pretrained=False, **kwargs):
    """Vision-RWKV-T with adapter for segmentation."""
    return _create("t", "seg", pretrained, **kwargs)


@register_model
def vrwkv_s_adapter_det(pretrained=False, **kwargs):
    """Vision-RWKV-S with adapter for detection."""
    return _create("s", "det", pretrained, **kwargs)


@register_model
def vrwkv_s_adapter_seg(pretrained=False, **kwargs):
    """Vision-RWKV-S with adapter for segmentation."""
    return _create("s", "seg", pretrained, **kwargs)


@register_model
def vrwkv_b_adapter_det(pretrained=False, **kwargs):
    """Vision-RWKV-B with adapter for detection."""
    return _create("b", "det", pretrained, **kwargs)


@register_model
def vrwkv_b_adapter_seg(pretrained=False, **kwargs):
    """Vision-RWKV-B with adapter for segmentation."""
    return _create("b", "seg", pretrained, **kwargs)


@register_model
def vrwkv_l_adapter_det(pretrained=False, **kwargs):
    """Vision-RWKV-L with adapter for detection."""
    return _create("l", "det", pretrained, **kwargs)


@register_model
def vrwkv_l_adapter_seg(pretrained=False, **kwargs):
    """Vision-RWKV-L with adapter for segmentation."""
    return _create("l", "seg", pretrained, **kwargs)
