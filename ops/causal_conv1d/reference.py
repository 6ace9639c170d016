"""The causal convolution in plain PyTorch: the specification."""

import torch.nn.functional as F

from ..selective_scan.reference import tokens_in_order, tokens_in_place


def depthwise_conv(x, weight, bias):
    """``(B, T, D)`` with ``(D, K)``: a 2-D convolution of channel-last maps of height 1, which reads x as it lies."""
    taps = weight.shape[1]
    rows = x.unsqueeze(1).permute(0, 3, 1, 2)
    y = F.conv2d(rows, weight[:, None, None], bias, padding=(0, taps - 1), groups=weight.shape[0])
    return y[..., : x.shape[1]].squeeze(2).transpose(1, 2)


def causal_conv1d(x, weight, bias=None, order=None, conv=depthwise_conv):
    """See `linzoo.ops.causal_conv1d`; `conv` does the convolution of ``(B, T, G * C)`` tokens that lie in order."""
    length = x.shape[1]
    tokens = tokens_in_order(x, order).flatten(2)
    y = conv(tokens, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return tokens_in_place(y.unflatten(2, x.shape[2:]), order, length)
