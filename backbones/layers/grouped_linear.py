"""A linear map per group of channels."""

import torch
from torch import nn


def grouped_linear(x, weight, bias=None):
    """``y[..., g, :] = weight[g] @ x[..., g, :] + bias[g]``.

    Args:
        x: ``(..., G, I)``.
        weight: ``(G, O, I)``.
        bias: ``(G, O)``.

    Returns:
        ``(..., G, O)``, a view of memory in which each group's rows are contiguous.
    """
    rows = x.flatten(0, -3).transpose(0, 1)
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.transpose(0, 1).unflatten(0, x.shape[:-2])


class GroupedLinear(nn.Module):
    """`grouped_linear` with its weight ``(groups, out_features, in_features)``; sizes are per group."""

    def __init__(self, groups: int, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return grouped_linear(x, self.weight)
