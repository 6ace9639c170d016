"""Depthwise convolution in plain PyTorch: the specification."""

import torch.nn.functional as F


def depthwise_conv2d(x, weight, bias=None, pad_rows=0, pad_columns=0, dilation=1):
    """See `linzoo.ops.depthwise_conv2d`."""
    maps, padding = x.permute(0, 3, 1, 2), (pad_rows, pad_columns)
    y = F.conv2d(maps, weight.unsqueeze(1), bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)
