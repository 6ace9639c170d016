"""Deformable convolution in plain PyTorch: the specification. Autograd gives its gradients."""

import torch
import torch.nn.functional as F

from ..tensors import state_dtype


def _points(offset, size, stride, padding, dilation, offset_scale):
    """Sampling points (x, y), in pixels, of every output pixel, group and tap: ``(B G, H' W', K K, 2)``."""
    B, rows, columns, G, taps, _ = offset.shape
    K = round(taps**0.5)
    centre = dilation * (K - 1) // 2

    def axis(length):
        return torch.arange(length, device=offset.device, dtype=offset.dtype) * stride - padding + centre

    window = torch.arange(K, device=offset.device, dtype=offset.dtype) * dilation - centre
    taps_xy = torch.stack(torch.meshgrid(window, window, indexing="ij"), -1).flatten(0, 1)
    pixels_xy = torch.stack(torch.meshgrid(axis(rows), axis(columns), indexing="ij")[::-1], -1)
    xy = pixels_xy[:, :, None, None] + offset_scale * (taps_xy + offset)
    extent = torch.tensor(size[::-1], device=offset.device, dtype=offset.dtype)
    xy = torch.minimum(xy.nan_to_num(-2).clamp(min=-2), extent + 1)  # still outside, and no number is too large
    return xy.permute(0, 3, 1, 2, 4, 5).reshape(B * G, rows * columns, taps, 2)


def bilinear(maps, xy):
    """Means of four pixels of ``(n, C, H, W)`` around points ``(n, P, K, 2)``; pixels outside count as 0."""
    height, width = maps.shape[2:]
    corner = xy.floor()
    pixels, samples = maps.flatten(2), 0
    for right in (0, 1):
        for below in (0, 1):
            x, y = corner[..., 0] + right, corner[..., 1] + below
            across, down = (xy - corner).unbind(-1)
            share = (across if right else 1 - across) * (down if below else 1 - down)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long()
            values = pixels.gather(2, index.flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1))
            samples = samples + values.unflatten(2, index.shape[1:]) * (share * inside).unsqueeze(1)
    return samples


def grid_sample(maps, xy):
    """As `bilinear`, with the PyTorch function that ONNX knows; it has only first derivatives."""
    extent = torch.tensor(maps.shape[:1:-1], device=xy.device, dtype=xy.dtype)
    return F.grid_sample(maps, (2 * xy + 1) / extent - 1, align_corners=False)


def deform_conv(x, offset, weight, stride, padding, dilation, offset_scale, sample=bilinear):
    """See `linzoo.ops.deform_conv`."""
    dtype = state_dtype(x.dtype)
    _, rows, columns, G, taps = weight.shape
    maps = x.to(dtype).unflatten(-1, (G, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B G, C / G, H, W)
    xy = _points(offset.to(dtype), x.shape[1:3], stride, padding, dilation, offset_scale)
    weights = weight.to(dtype).permute(0, 3, 1, 2, 4).reshape(-1, 1, rows * columns, taps)
    y = (sample(maps, xy) * weights).sum(-1).unflatten(-1, (rows, columns))
    return y.unflatten(0, (-1, G)).permute(0, 3, 4, 1, 2).flatten(3).to(x.dtype)
