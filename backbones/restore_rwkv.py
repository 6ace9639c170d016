"""Restore-RWKV.

Paper: Restore-RWKV: Efficient and Effective Medical Image Restoration with RWKV
- https://arxiv.org/abs/2407.11087

A four-level U-Net like Restormer's whose blocks are RWKV's: BiWKV along rows and again along columns (Re-WKV), and a
depthwise 5x5 token shift trained as a sum of branches (Omni-Shift). It returns the restored image.

The U-Net is a layer (`layers/rwkv_unet.py`), because FS-RWKV also uses it.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .layers.checkpoint import rename, reshape_as, unwrap_state_dict
from .layers.omni_shift import OMNI_SHIFT_NAMES
from .layers.rwkv import RWKV_NAMES
from .layers.rwkv_unet import RWKVUNet

__all__ = ["RestoreRWKV"]


class RestoreRWKV(RWKVUNet):
    """Restore-RWKV (arXiv 2407.11087); see `RWKVUNet` for its arguments."""


_RENAMES = [
    (r"^patch_embed\.", "stem."),
    (r"^encoder_level(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^latent\.", "stages.3.blocks."),
    (r"^decoder_level(\d)\.", lambda m: f"decoder.{3 - int(m[1])}.blocks."),
    (r"^refinement\.", "refinement.blocks."),
    (r"^down(\d)_\d\.body\.", lambda m: f"downsamples.{int(m[1]) - 1}."),
    (r"^up(\d)_\d\.body\.", lambda m: f"upsamples.{4 - int(m[1])}."),
    (r"^reduce_chan_level(\d)\.", lambda m: f"reduces.{3 - int(m[1])}."),
    (r"^output\.", "head."),
    *OMNI_SHIFT_NAMES,
    *RWKV_NAMES,
]


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours; unused convolutions from 2024 are left out."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.weight" in state_dict:
        return state_dict
    out = {rename(key, _RENAMES): value for key, value in state_dict.items() if not key.endswith(".att.dwconv.weight")}
    return reshape_as(out, model)


def _cfg(**kwargs):
    return {
        "num_classes": 1,
        "input_size": (1, 128, 128),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "stem",
        "classifier": "head",
        "origin_url": "https://github.com/Yaziwel/Restore-RWKV",
        "paper_ids": "arXiv:2407.11087",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"restore_rwkv": _cfg(), "restore_rwkv_light": _cfg()})


def _create_restore_rwkv(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        RestoreRWKV,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes",),  # output channels equal input channels
        **kwargs,
    )


@register_model
def restore_rwkv(pretrained=False, **kwargs):
    """Restore-RWKV."""
    return _create_restore_rwkv("restore_rwkv", pretrained, **kwargs)


@register_model
def restore_rwkv_light(pretrained=False, **kwargs):
    """Restore-RWKV, light; sizes are inferred from its parameter count, since the authors publish none."""
    model_args = dict(dim=16, depths=(1, 1, 2, 2), refinement=1)
    return _create_restore_rwkv("restore_rwkv_light", pretrained, **dict(model_args, **kwargs))
