"""Parts of U-Nets with VMamba blocks; maps are channel-last ``(B, H, W, C)``."""

from collections.abc import Callable

from timm.layers import DropPath
from torch import Tensor, nn


class VSSBlock(nn.Module):
    """``x += Mixer(LN(x))``; `mixer` is a class, called with the number of channels."""

    def __init__(self, dim: int, mixer: Callable[..., nn.Module], drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = mixer(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class PatchExpand(nn.Module):
    """Linear map, pixel shuffle to `scale` times the size, LayerNorm: ``(B, H, W, C)`` to `dim_out` channels."""

    def __init__(self, dim: int, dim_out: int, scale: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * dim_out, bias=False, **dd)
        self.norm = nn.LayerNorm(dim_out, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x).unflatten(-1, (self.scale, self.scale, -1))  # (B, H, W, p, q, C)
        return self.norm(x.transpose(2, 3).flatten(1, 2).flatten(2, 3))
