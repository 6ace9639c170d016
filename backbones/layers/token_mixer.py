"""Token mixers by name: one module that maps ``(B, H, W, C)`` to the same, for networks of your own."""

from collections.abc import Callable

from timm.layers import Attention
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .mlstm import MLSTMMixer
from .nc_ssd import NCSSD
from .rwkv import SpatialMix, SpatialMix6, SpatialMix7
from .ss2d import SS2D
from .vim_mixer import VimMixer

HEAD = 64  # channels

# How to make each mixer, from (dim, layer, layers, **dd), and what it takes.
TOKEN_MIXERS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "attention": (lambda dim, *_, **dd: Attention(dim, dim // HEAD, qkv_bias=True, **dd), "tokens"),
    "bi_wkv": (SpatialMix, "tokens, grid"),
    "mlstm": (lambda dim, *_, **dd: MLSTMMixer(dim, **dd), "tokens, grid"),
    "nc_ssd": (lambda dim, *_, **dd: NCSSD(dim, 2 * dim // HEAD, HEAD, **dd), "map"),
    "s6": (lambda dim, *_, **dd: VimMixer(dim, **dd), "tokens"),
    "ss2d": (lambda dim, *_, **dd: SS2D(dim, **dd), "map"),
    "wkv6": (SpatialMix6, "tokens, grid"),
    "wkv7": (SpatialMix7, "tokens, grid"),
}


@register_notrace_module  # FX cannot trace grids, which depend on the map's size
class TokenMixer(nn.Module):
    """The token mixer `name` as in its family, for maps ``(B, H, W, C)`` of any size; the output has the same shape.

    Norm and residual are not included: ``x = x + mixer(norm(x))``.

    Args:
        name: "attention" (softmax), "bi_wkv" (Vision-RWKV), "mlstm" (ViL: one direction, reversed in every other
            layer), "nc_ssd" (VSSD), "s6" (Vim), "ss2d" (VMamba), "wkv6" (Vision-RWKV-6) or "wkv7" (`SpatialMix7`).
        dim: Channels C, a multiple of 64.
        layer, layers: Index of the block and number of blocks; some initial values depend on them.

    Raises:
        ValueError: there is no mixer with that name, or `dim` is not a multiple of 64.
    """

    def __init__(self, name: str, dim: int, layer: int = 0, layers: int = 12, device=None, dtype=None):
        super().__init__()
        if name not in TOKEN_MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(TOKEN_MIXERS)}, got {name!r}")
        if dim < HEAD or dim % HEAD:
            raise ValueError(f"dim: expected a multiple of {HEAD}, got {dim}")
        make, self.takes = TOKEN_MIXERS[name]
        self.turned = name == "mlstm" and layer % 2 == 1
        self.mixer = make(dim, layer, layers, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.takes == "map":
            return self.mixer(x)
        grid, tokens = x.shape[1:3], x.flatten(1, 2)
        if self.turned:
            tokens = tokens.flip(1)
        y = self.mixer(tokens, grid) if self.takes == "tokens, grid" else self.mixer(tokens)
        return (y.flip(1) if self.turned else y).unflatten(1, grid)
