"""Learned averages of earlier outputs, which connect the mixers of MambaMixer (arXiv 2403.19888)."""

import torch
from torch import nn


class WeightedAverage(nn.Module):
    """``sum_i a_i T_i + sum_i b_i C_i`` of token mixers' outputs T and channel mixers' outputs C.

    T_0 and C_0 are both the input of the stage. All weights start at 1, except b_0 at 0. Every mixer then reads the
    input plus all outputs so far, as in a residual network.
    """

    def __init__(self, tokens: int, channels: int, learned: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(tokens, **dd), requires_grad=learned)
        self.channels = nn.Parameter(torch.empty(channels, **dd), requires_grad=learned)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.ones_(self.tokens)
        nn.init.ones_(self.channels)
        self.channels[0] = 0

    def forward(self, tokens, channels):
        terms = [self.tokens[i] * y for i, y in enumerate(tokens)]
        return sum(terms + [self.channels[i] * y for i, y in enumerate(channels)])
