"""ViL (Vision-LSTM), in its second version.

Paper: Vision-LSTM: xLSTM as Generic Vision Backbone - https://arxiv.org/abs/2406.04303

Patch tokens of one width and pairs of mLSTM blocks. One block walks the tokens row by row from the upper left corner;
the other, with its own weights, from the lower right corner.
"""

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .layers import Isotropic, MLSTMMixer, unwrap_state_dict
from .layers.checkpoint import rename
from .layers.pretrained import imagenet_cfg

__all__ = ["ViL"]


class MLSTMBlock(nn.Module):
    """``x + Mixer(LN(x))``."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = MLSTMMixer(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x), grid))


@register_notrace_module  # FX cannot trace grids, which depend on the image's size
class Pair(nn.Module):
    """A block on the tokens ``(B, L, C)`` as they are, then one on the image rotated by 180 degrees."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.forth = MLSTMBlock(dim, drop_path, **dd)
        self.back = MLSTMBlock(dim, drop_path, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.back(self.forth(x, grid).flip(1), grid).flip(1)


class ViL(Isotropic):
    """ViL (arXiv 2406.04303).

    Args:
        img_size: Height and width (or one side) of images that fit the position table; interpolated for other sizes.
        patch_size: Side of a patch.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: 'ends' (the first and the last token concatenated, then normalised) or as in `Isotropic`.
        dim: Width.
        depth: Pairs of blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, the same for every block.
    """

    antialias_pos_embed = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "ends",
        dim: int = 192,
        depth: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(
            img_size, patch_size, patch_size, in_chans, num_classes, global_pool, dim, depth, False, drop_rate, **dd
        )
        self.blocks = nn.ModuleList([Pair(dim, drop_path_rate, **dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        if global_pool == "ends":
            self.pre_head = nn.LayerNorm(2 * dim, **dd)
        self.init_weights(needs_reset=False)

    @property
    def head_hidden_size(self) -> int:
        """Number of input channels of the classifier."""
        return self.num_features * (2 if self.global_pool in ("ends", "catavgmax") else 1)

    def _pool(self, global_pool: str) -> str:
        return global_pool if global_pool == "ends" else super()._pool(global_pool)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        super().init_weights(needs_reset)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.num_features, -1))
        nn.init.zeros_(self.patch_embed.bias)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """As in `Isotropic`."""
        return dict(
            stem=r"^pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^(?:norm|pre_head)", (99999,))]
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, and with another pooling also the norm before it; None keeps the pooling."""
        super().reset_classifier(num_classes, global_pool)
        if self.global_pool != "ends":
            self.pre_head = nn.Identity()
        elif isinstance(self.pre_head, nn.Identity):
            weight = self.patch_embed.weight
            self.pre_head = nn.LayerNorm(2 * self.num_features, device=weight.device, dtype=weight.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As in `Isotropic`."""
        if self.global_pool != "ends":
            return super().forward_head(x, pre_logits)
        x = self.head_drop(self.pre_head(torch.cat([x[:, 0], x[:, -1]], dim=1)))
        return x if pre_logits else self.head(x)


# Published names and ours.
_RENAMES = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^pos_embed\.embed$", "pos_embed"),
    (r"^legacy_norm\.", "pre_head."),
    (r"\.rowwise_from_top_left\.", ".forth."),
    (r"\.rowwise_from_bot_right\.", ".back."),
    (r"\.layer\.mlstm_cell\.outnorm\.", ".mixer.norm."),
    (r"\.layer\.mlstm_cell\.igate\.", ".mixer.input_gate."),
    (r"\.layer\.mlstm_cell\.fgate\.", ".mixer.forget_gate."),
    (r"\.layer\.proj_up\.", ".mixer.in_proj."),
    (r"\.layer\.proj_down\.", ".mixer.out_proj."),
    (r"\.layer\.learnable_skip$", ".mixer.skip"),
    (r"\.layer\.([qkv])_proj\.", r".mixer.\1."),
    (r"\.layer\.conv\.", ".mixer.conv."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: ViL) -> dict[str, Tensor]:
    """Converts the published state dict to ours, and the position table to the model's grid.

    Published norms, except the one before the classifier, store the difference of their factors from 1.
    """
    state_dict = unwrap_state_dict(state_dict)
    if "pos_embed.embed" not in state_dict:
        out = dict(state_dict)
    else:
        out = {rename(key, _RENAMES): value for key, value in state_dict.items()}
        out["pos_embed"] = out["pos_embed"].flatten(1, 2)
        for key, value in out.items():
            if key == "norm.weight" or key.endswith(".norm.weight"):
                out[key] = value + 1
            if ".mixer.norm." in key:
                out[key] = out[key].unflatten(0, model.blocks[0].forth.mixer.heads)
    out["pos_embed"] = model.fit_positions(out["pos_embed"])
    return out


def _cfg(**kwargs):
    return imagenet_cfg(
        pool_size=None,
        min_input_size=(3, 16, 16),
        crop_pct=1.0,
        first_conv="patch_embed",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/NX-AI/vision-lstm",
        paper_ids="arXiv:2406.04303",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"vil_{size}.in1k": _cfg() for size in "tsb"})


def _create_vil(variant: str, pretrained: bool = False, **kwargs) -> ViL:
    depth = kwargs.get("depth", 12)
    return build_model_with_cfg(
        ViL,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(depth * (i + 1) // 4 - 1 for i in range(4)), feature_cls="getter"),
        **kwargs,
    )


@register_model
def vil_t(pretrained: bool = False, **kwargs) -> ViL:
    """ViL-T."""
    return _create_vil("vil_t", pretrained, **kwargs)


@register_model
def vil_s(pretrained: bool = False, **kwargs) -> ViL:
    """ViL-S."""
    return _create_vil("vil_s", pretrained, **dict(dict(dim=384), **kwargs))


@register_model
def vil_b(pretrained: bool = False, **kwargs) -> ViL:
    """ViL-B."""
    return _create_vil("vil_b", pretrained, **dict(dict(dim=768), **kwargs))
