"""VSSD's mixer: non-causal state-space duality."""

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import nc_ssd

from .conv import Conv2dNHWC
from .s6 import init_step_bias


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class NCSSD(nn.Module):
    """Non-causal state-space duality mixer.

    ``[z, x, B, C, dt] = W_in u;  [x, B, C] = SiLU(DWConv([x, B, C]));  m = softplus(dt + dt_bias) exp(A_log)``, then
    ``W_out (LN(nc_ssd(x, m, B, C, D)) * z)``: the norm comes before the gate, which has no activation.

    Args:
        dim: Channels C of the map ``(B, H, W, C)``; the inner width is 2 C.
        num_heads: Heads of ``2 C / num_heads`` channels.
        d_state: N.
    """

    def __init__(self, dim: int, num_heads: int, d_state: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner, mixed = 2 * dim, 2 * dim + 2 * d_state
        self.num_heads, self.sizes = num_heads, [inner, mixed, num_heads]
        self.split = [inner, d_state, d_state]
        self.in_proj = nn.Linear(dim, inner + mixed + num_heads, bias=False, **dd)
        self.conv = Conv2dNHWC(mixed, mixed, 3, padding=1, groups=mixed, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        init_step_bias(self.dt_bias)
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        nn.init.ones_(self.D)

    def forward(self, u):
        z, mixed, dt = self.in_proj(u).split(self.sizes, dim=-1)
        x, B, C = F.silu(self.conv(mixed)).flatten(1, 2).split(self.split, dim=-1)
        weight = F.softplus(dt.flatten(1, 2) + self.dt_bias) * torch.exp(self.A_log)
        return self.out_proj(self.norm(self.scan(x, weight, B, C)).view(z.shape) * z)

    def scan(self, x, weight, B, C):
        """`linzoo.ops.nc_ssd` on all heads' channels ``(B, L, D)``."""
        return nc_ssd(x.unflatten(-1, (self.num_heads, -1)), weight, B, C, self.D).flatten(2)
