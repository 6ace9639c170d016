"""ViL's mixer: the matrix memory of xLSTM (mLSTM)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linzoo.ops import mlstm

from .grouped_linear import grouped_linear
from .norm import GroupedLayerNorm

BLOCK = 4  # channels that a projection mixes
TOGETHER = 4  # blocks that are multiplied as one, with zeros off the diagonal: products of 4 x 4 are mostly overhead


class BlockLinear(nn.Module):
    """A linear map of `BLOCK` neighbouring channels at a time: weight ``(C / 4, 4, 4)``, bias ``(C,)``."""

    def __init__(self, dim: int, std: float, device=None, dtype=None):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(dim // BLOCK, BLOCK, BLOCK, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A normal distribution, and zeros."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        together = math.gcd(len(self.weight), TOGETHER)
        size = together * BLOCK
        diagonal = torch.eye(together, dtype=self.weight.dtype, device=x.device).view(together, 1, together, 1)
        weight = (self.weight.view(-1, together, BLOCK, 1, BLOCK) * diagonal).reshape(-1, size, size)
        return grouped_linear(x.unflatten(-1, (-1, size)), weight, self.bias.view(-1, size)).flatten(-2)


class MLSTMMixer(nn.Module):
    """ViL's layer for tokens ``(B, L, C)`` on a grid; its inner width is E = 2 C.

    ``[x, z] = W_up u;  a = SiLU(DWConv(x));  q, k, v = Q a, K a, V x;  i, f = W [q, k, v];
    W_down ((GroupNorm(mlstm(q, k, v, i, f)) + skip a) SiLU(z))``.
    """

    def __init__(self, dim: int, num_heads: int = 4, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner, std = 2 * dim, math.sqrt(2 / (5 * dim))
        self.dim, self.heads = dim, (num_heads, inner // num_heads)
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.q, self.k, self.v = (BlockLinear(inner, std, **dd) for _ in range(3))
        self.input_gate = nn.Linear(3 * inner, num_heads, **dd)
        self.forget_gate = nn.Linear(3 * inner, num_heads, **dd)
        self.norm = GroupedLayerNorm(num_heads, inner // num_heads, **dd)
        self.skip = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, dim, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Published initial values: gates that do not depend on the token, with memories of different lengths."""
        nn.init.normal_(self.in_proj.weight, std=math.sqrt(2 / (5 * self.dim)))
        nn.init.normal_(self.out_proj.weight, std=2 / math.sqrt(self.dim))
        for zero in (self.in_proj.bias, self.out_proj.bias, self.input_gate.weight, self.forget_gate.weight):
            nn.init.zeros_(zero)
        nn.init.normal_(self.input_gate.bias, std=0.1)
        self.forget_gate.bias.copy_(torch.linspace(3, 6, self.heads[0], device=self.skip.device))
        nn.init.ones_(self.skip)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        a = F.silu(self.conv(x.mT.unflatten(2, grid))).flatten(2).mT
        q, k, v = self.q(a), self.k(a), self.v(x)
        gates = torch.cat([q, k, v], dim=-1)
        q, k, v = (y.unflatten(-1, self.heads) for y in (q, k, v))
        y = mlstm(q, k, v, self.input_gate(gates), self.forget_gate(gates))
        y = self.norm(y.to(self.norm.weight.dtype)).flatten(2)
        return self.out_proj((y + self.skip * a) * F.silu(z))
