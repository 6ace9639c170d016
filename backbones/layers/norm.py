"""Normalisations that timm does not have."""

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import nn


class GroupedLayerNorm(nn.Module):
    """LayerNorm of each group's channels with its own weights: ``(..., G, d)``, weight and bias ``(G, d)``."""

    def __init__(self, groups: int, dim: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(groups, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(groups, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), self.weight)


class RMSNorm(nn.Module):
    """``w x / sqrt(mean(x^2) + 1e-5)`` in float32 at least, returned in the dtype of the weight."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-5).to(self.weight.dtype)


@register_notrace_module  # FX cannot trace the check of the input's axes
class BatchNormNHWC(nn.BatchNorm1d):
    """BatchNorm of a channel-last map ``(B, H, W, C)``."""

    def forward(self, x):
        return super().forward(x.flatten(0, 2)).view(x.shape)
