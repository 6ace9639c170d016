"""U-Mamba for volumes; the network is in `umamba.py`."""

from timm.models import generate_default_cfgs, register_model

from .umamba import UMamba, checkpoint_filter_fn, create_umamba, plan_cfg

__all__ = ["checkpoint_filter_fn"]

PLAN = dict(patch_size=(64, 64, 64), features=(32, 64, 128, 256, 320), strides=(2, 2, 2, 2))

default_cfgs = generate_default_cfgs({name: plan_cfg(None) for name in ("umamba_bot_3d", "umamba_enc_3d")})


@register_model
def umamba_bot_3d(pretrained: bool = False, **kwargs) -> UMamba:
    """U-Mamba for volumes, with a Mamba layer at the bottleneck; the default plan is ours."""
    return create_umamba("umamba_bot_3d", pretrained, **dict(dict(PLAN, mamba="bot"), **kwargs))


@register_model
def umamba_enc_3d(pretrained: bool = False, **kwargs) -> UMamba:
    """U-Mamba for volumes, with a Mamba layer after every stage of the encoder; the default plan is ours."""
    return create_umamba("umamba_enc_3d", pretrained, **dict(dict(PLAN, mamba="enc"), **kwargs))
