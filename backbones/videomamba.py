"""VideoMamba for images; `videomamba_video` has the version for clips.

Paper: VideoMamba: State Space Model for Efficient Video Understanding (ECCV 2024) - https://arxiv.org/abs/2403.06977

Vim with the class token in front of the others, and with the outputs of the two directions added.
"""

import math

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers import S6, Isotropic, RMSNorm, VimBlock, unwrap_state_dict
from .layers.checkpoint import stack_directions
from .layers.pretrained import imagenet_cfg

__all__ = ["VideoMamba"]


class VideoMamba(Isotropic):
    """VideoMamba for images (arXiv 2403.06977).

    Args:
        img_size: Height and width (or one side) of images that fit the position table; interpolated for other sizes.
        patch_size: Side of a patch.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`.
        dim: Width.
        depth: Blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    token_first = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
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
            img_size, patch_size, patch_size, in_chans, num_classes, global_pool, dim, depth, True, drop_rate, **dd
        )
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList([VimBlock(dim, rate, average=False, **dd) for rate in rates])
        self.norm = RMSNorm(dim, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        super().init_weights(needs_reset)
        nn.init.zeros_(self.cls_token)
        for block in self.blocks:
            out_proj = block.mixer.out_proj.weight
            nn.init.kaiming_uniform_(out_proj, a=math.sqrt(5))
            with torch.no_grad():
                out_proj /= math.sqrt(len(self.blocks))

    @staticmethod
    def _init_weights(module: nn.Module, needs_reset: bool = False) -> None:
        """Initialises all linear maps alike, including those of S6: the published models started with step bias 0."""
        Isotropic._init_weights(module, needs_reset)
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, S6):
            module.init_as_linear()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Besides positions and class token: the rates, skips and step biases of the scans."""
        kept = (".s6.A_log", ".s6.D", ".s6.dt_bias")
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name.endswith(kept)}

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As in `Isotropic`; the stream between the blocks is in float32 or wider."""
        x, grid = super().embed(x)
        return x.to(torch.promote_types(x.dtype, torch.float32)), grid


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VideoMamba) -> dict[str, Tensor]:
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
        origin_url="https://github.com/OpenGVLab/VideoMamba",
        paper_ids="arXiv:2403.06977",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"videomamba_{size}.in1k": _cfg() for size in "tsm"})


def _create_videomamba(variant: str, pretrained: bool = False, **kwargs) -> VideoMamba:
    depth = kwargs.get("depth", 24)
    return build_model_with_cfg(
        VideoMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(depth * (i + 1) // 4 - 1 for i in range(4)), feature_cls="getter"),
        **kwargs,
    )


@register_model
def videomamba_t(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-Ti."""
    return _create_videomamba("videomamba_t", pretrained, **kwargs)


@register_model
def videomamba_s(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-S."""
    return _create_videomamba("videomamba_s", pretrained, **dict(dict(dim=384), **kwargs))


@register_model
def videomamba_m(pretrained: bool = False, **kwargs) -> VideoMamba:
    """VideoMamba-M."""
    return _create_videomamba("videomamba_m", pretrained, **dict(dict(dim=576, depth=32), **kwargs))
