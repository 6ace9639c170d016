"""The bidirectional Mamba mixer of Vim."""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import causal_conv1d

from .norm import RMSNorm
from .s6 import S6


class CausalConv(nn.Module):
    """`linzoo.ops.causal_conv1d` and SiLU, with weights ``(groups, dim, taps)`` and bias ``(groups, dim)``."""

    def __init__(self, dim: int, groups: int, taps: int = 4, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, dim, taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(groups, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x, order=None):
        return causal_conv1d(x, self.weight, self.bias, order=order, activation="silu")


@register_notrace_module  # FX cannot trace scan orders, which depend on the number of tokens
class VimMixer(nn.Module):
    """Bidirectional Mamba mixer of tokens ``(B, L, C)`` (Vim, arXiv 2401.09417, algorithm 1).

    ``[x, z] = W_in u;  y = mean over both directions of S6(SiLU(conv(x)));  W_out (y * SiLU(z))``: the directions
    share the projections and the gate. Each has its own causal convolution and scan parameters.

    Args:
        dim: Channels C.
        directions: Scans; numbers other than 2 are for classes derived from this one.
        expand: Inner width over C.
        d_state: N, states per channel.
        taps: Width of the causal convolution.
        average: Whether the directions' outputs are averaged, as in Vim, or added, as in VideoMamba.
    """

    def __init__(
        self,
        dim: int,
        directions: int = 2,
        expand: int = 2,
        d_state: int = 16,
        taps: int = 4,
        average: bool = True,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.average = average
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = CausalConv(inner, directions, taps, **dd)
        self.s6 = S6(inner, directions, d_state, dt_rank=math.ceil(dim / 16), **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, u):
        x, z = self.in_proj(u).chunk(2, dim=-1)
        forth = torch.arange(u.shape[1], dtype=torch.int32, device=u.device)
        order = torch.stack([forth, forth.flip(0)])
        y = self.s6(self.conv(x.unsqueeze(2).expand(-1, -1, 2, -1), order), order, merge=True)
        y = y * F.silu(z)
        return self.out_proj(y / 2 if self.average else y)


class VimBlock(nn.Module):
    """``r + Mixer(RMS(r))`` with the residual stream r in float32 whatever the weights' dtype; see `VimMixer`."""

    def __init__(self, dim: int, drop_path: float = 0.0, average: bool = True, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = RMSNorm(dim, **dd)
        self.mixer = VimMixer(dim, average=average, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid=None):
        return x + self.drop_path(self.mixer(self.norm(x))).to(x.dtype)
