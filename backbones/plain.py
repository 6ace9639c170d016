"""Plain ViTs that differ only in their token mixer.

For comparisons: patches of 16 px with learned positions, twelve blocks ``x += mixer(LN(x)); x += MLP(LN(x))`` of one
width, a norm, a mean over the tokens and a linear classifier (ViT, arXiv 2010.11929, without its class token). There
are no published weights.
"""

import sys

from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .layers import Isotropic, TokenMixer, channel_mixer
from .layers.pretrained import imagenet_cfg
from .layers.token_mixer import TOKEN_MIXERS

__all__ = ["PlainMixer"]

# Token mixer and channel mixer of each; KAT's GR-KAN is combined with attention.
MIXERS = {name: (name, "mlp") for name in TOKEN_MIXERS} | {"grkan": ("attention", "grkan")}


@register_notrace_module  # FX cannot trace grids, which depend on the image's size
class Block(nn.Module):
    """``x += mixer(LN(x));  x += mlp(LN(x))`` on tokens ``(B, L, C)`` of a grid."""

    def __init__(self, dim: int, mixer: str, layer: int, layers: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        token_mixer, mlp = MIXERS[mixer]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = TokenMixer(token_mixer, dim, layer, layers, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = channel_mixer(mlp)(dim, 4 * dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        mixed = self.mixer(self.norm1(x).unflatten(1, grid)).flatten(1, 2)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainMixer(Isotropic):
    """A plain ViT with a token mixer chosen by name.

    Args:
        img_size: Height and width (or one side) of images that fit the position table; interpolated for other sizes.
        patch_size: Side of a patch.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`, without a class token.
        mixer: A token mixer of `linzoo.backbones.layers.TokenMixer`, or "grkan" for attention with GR-KAN as the
            channel mixer.
        dim: Width, a multiple of 64.
        depth: Blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.

    Raises:
        ValueError: there is no such mixer, or `dim` is not a multiple of 64.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mixer: str = "ss2d",
        dim: int = 192,
        depth: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        if mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {mixer!r}")
        super().__init__(
            img_size, patch_size, patch_size, in_chans, num_classes, global_pool, dim, depth, False, drop_rate, **dd
        )
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList([Block(dim, mixer, i, depth, rate, **dd) for i, rate in enumerate(rates)])
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset=True):
        """As in `Isotropic`, with ViT's small classifier."""
        super().init_weights(needs_reset)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def _create_plain(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        PlainMixer,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(2, 5, 8, 11), feature_cls="getter"),
        **kwargs,
    )


WIDTHS = {"t": 192, "s": 384}
VARIANTS = {f"plain_{mixer}_{size}": (mixer, dim) for mixer in sorted(MIXERS) for size, dim in WIDTHS.items()}

default_cfgs = generate_default_cfgs(
    {
        name: imagenet_cfg(
            pool_size=None,
            min_input_size=(3, 16, 16),
            first_conv="patch_embed",
            classifier="head",
            license="apache-2.0",
            paper_ids="arXiv:2010.11929",
        )
        for name in VARIANTS
    }
)


def _register(variant):
    """Registers `variant` with timm, which finds a model by its function's name and module."""
    mixer, dim = VARIANTS[variant]

    def entry(pretrained=False, **kwargs):
        return _create_plain(variant, pretrained, **dict(dict(mixer=mixer, dim=dim), **kwargs))

    entry.__name__ = entry.__qualname__ = variant
    entry.__doc__ = f"A plain ViT of width {dim} with the mixer {mixer}."
    setattr(sys.modules[__name__], variant, register_model(entry))


for _variant in VARIANTS:
    _register(_variant)
