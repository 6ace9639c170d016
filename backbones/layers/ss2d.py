"""SS2D, the 2-D selective scan of VMamba."""

import math

import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import scan_order

from .conv import Conv2dNHWC
from .s6 import S6


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class SS2D(nn.Module):
    """2-D selective scan (VMamba, arXiv 2401.10166, section 4.2): four routes over the map, summed.

    ``p = SiLU(DWConv(W_in x));  y = LN(sum_k S6_k(p));  W_out y``, with `gated` ``[p, z] = W_in x`` and
    ``W_out (y * SiLU(z))``.

    Args:
        dim: Channels C of the map ``(B, H, W, C)``.
        ratio: Inner width over C.
        d_state: N, states per channel.
        gated: Whether a gate branch multiplies the output (VMamba's first version; its convolution also has a bias).
    """

    def __init__(self, dim: int, ratio: float = 2.0, d_state: int = 1, gated: bool = False, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(ratio * dim)
        self.gated = gated
        self.in_proj = nn.Linear(dim, 2 * inner if gated else inner, bias=False, **dd)
        self.conv = Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, bias=gated, **dd)
        self.s6 = S6(inner, 4, d_state, dt_rank=math.ceil(dim / 16), **dd)
        self.out_norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x):
        p, gate = self.in_proj(x), None
        if self.gated:
            p, gate = p.chunk(2, dim=-1)
        y = self.out_norm(self.scan(F.silu(self.conv(p))))
        return self.out_proj(y if gate is None else y * F.silu(gate))

    def scan(self, p):
        """Scans the map `p` ``(B, H, W, D)`` along all routes and sums the results."""
        H, W = p.shape[1:3]
        return self.s6(p.flatten(1, 2), scan_order.cross(H, W, p.device), merge=True).unflatten(1, (H, W))
