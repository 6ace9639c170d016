"""The selective state-space layer (S6), on which the Mamba families build their mixers."""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from linzoo.ops import selective_scan

from .grouped_linear import grouped_linear


@torch.no_grad()
def init_step_bias(bias):
    """Mamba's initial step sizes: fills `bias` so that softplus(bias) is log-uniform in [0.001, 0.1]."""
    step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(0.001), math.log(0.1)).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class S6(nn.Module):
    """Input-dependent step, B and C, and the selective scan with them (Mamba, arXiv 2312.00752, algorithm 2).

    Each of `groups` scans has its own parameters and its own order::

        [r, B, C] = x_proj u;   y = selective_scan(u, r, -exp(A_log), B, C, D, dt_weight, dt_bias, order)

    Args:
        dim: Channels of one group.
        groups: Scans that run side by side.
        d_state: N, states per channel.
        dt_rank: R, rank of the step size; None for ``ceil(dim / 16)``.
        selects_from: Channels that `x_proj` reads, if they are not those of `u`; call such a layer through `scan`.
        bias_twice: Add the step's bias twice, in the projection and in the scan, as in MambaVision and PlainMamba.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        d_state: int = 1,
        dt_rank: int | None = None,
        selects_from: int | None = None,
        bias_twice: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.dim, self.groups, self.d_state, self.bias_twice = dim, groups, d_state, bias_twice
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.x_proj = nn.Parameter(torch.empty(groups, self.dt_rank + 2 * d_state, selects_from or dim, **dd))
        self.dt_weight = nn.Parameter(torch.empty(groups, dim, self.dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(groups, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(groups, dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(groups, dim, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        bound = self.x_proj.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj, -bound, bound)
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        init_step_bias(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def init_as_linear(self):
        """Fills x_proj, dt_weight and dt_bias as in code that initialises all linear maps alike, even the scan's."""
        trunc_normal_(self.x_proj, std=0.02)
        trunc_normal_(self.dt_weight, std=0.02)
        nn.init.zeros_(self.dt_bias)

    def forward(self, u, order=None, merge=False):
        """Scans `u`.

        Args:
            u: ``(B, L, D)``, read by every group, or ``(B, L, G, D)``.
            order: ``(G, T)`` or ``(B, G, T)`` integer scan orders; see `linzoo.ops.selective_scan`.
            merge: Sum the groups' outputs.

        Returns:
            ``(B, L, G, D)``, or ``(B, L, D)`` with `merge`.
        """
        projected = self.project(u)
        return self.scan(u.unsqueeze(2) if u.dim() == 3 else u, projected, order, merge)

    def project(self, u):
        """``[r, B, C]`` ``(B, L, G, R + 2 N)`` for the input of `forward`."""
        if u.dim() == 3:
            return F.linear(u, self.x_proj.flatten(0, 1)).unflatten(-1, (self.groups, -1))
        return grouped_linear(u, self.x_proj)

    def scan(self, u, projected, order=None, merge=False):
        """As `forward` on ``(B, L, G, D)`` or ``(B, L, 1, D)``, which every group reads, for callers who compute
        ``[r, B, C]`` ``(B, L, G, R + 2 N)`` themselves.

        A layer of one group scans any number of them with the same parameters.
        """
        if u.dtype == torch.float16 and torch.is_autocast_enabled(u.device.type):
            u = u.float()  # scan outputs of 1e4 and more overflow in float16
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        bias = 2 * self.dt_bias if self.bias_twice else self.dt_bias
        A, skip, weight, bias = (x.expand(dt.shape[2], *x.shape[1:]) for x in (A, self.D, self.dt_weight, bias))
        return selective_scan(u, dt, A, B, C, skip, dt_weight=weight, dt_bias=bias, order=order, merge=merge)
