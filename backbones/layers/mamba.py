"""Mamba's own mixer, along any scan orders."""

import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import Tensor

from .vim_mixer import VimMixer


@register_notrace_module  # FX cannot trace scan orders, which depend on the number of tokens
class MambaMixer(VimMixer):
    """Mamba mixer of tokens ``(B, L, C)`` (arXiv 2312.00752, section 3.4), with one scan per order.

    ``[x, z] = W_in u;  y = sum over orders of S6(SiLU(conv(x)));  W_out (y * SiLU(z))``: the scans share projections
    and gate. Each has its own causal convolution and parameters.

    Args:
        dim, expand, d_state, taps: As in `VimMixer`.
        directions: Scans G.
    """

    def __init__(
        self, dim: int, directions: int = 1, expand: int = 2, d_state: int = 16, taps: int = 4, device=None, dtype=None
    ):
        super().__init__(dim, directions, expand, d_state, taps, device=device, dtype=dtype)

    def forward(self, u: Tensor, order: Tensor | None = None) -> Tensor:
        """Tokens ``(B, L, C)`` and the scans' orders ``(G, L)`` or ``(B, G, L)``, None for raster order."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = x.unsqueeze(2).expand(-1, -1, self.s6.groups, -1)
        y = self.s6(self.conv(x, order), order, merge=True)
        return self.out_proj(y * F.silu(z))
