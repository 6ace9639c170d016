"""Squeeze and excite of normalised tokens."""

import torch.nn.functional as F
from torch import nn


class ChannelGate(nn.Module):
    """``x * sigmoid(W_2 GELU(W_1 mean_l LN(x)))``: channels weighted by the mean over all tokens.

    Args:
        dim: Channels C.
        reduction: C over the inner width, rounded down.
    """

    def __init__(self, dim: int, reduction: int = 8, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.fc1 = nn.Linear(dim, dim // reduction, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x):
        """Tokens ``(B, L, ..., C)``; the mean is over L."""
        mean = self.norm(x).mean(1, keepdim=True)
        return x * self.fc2(F.gelu(self.fc1(mean))).sigmoid()
