"""Deformable convolution in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F

from ..selective_scan.reference import state_dtype


def _points(offset, size, stride, padding, dilation, offset_scale):
    """Sampling points of every output pixel, group and tap, as `grid_sample` counts them: ``(B G, H' W', K K, 2)``."""
    B, rows, columns, G, taps, _ = offset.shape
    K = round(taps**0.5)
    centre = dilation * (K - 1) // 2

    def axis(length):
        return torch.arange(length, device=offset.device, dtype=offset.dtype) * stride - padding + centre

    window = torch.arange(K, device=offset.device, dtype=offset.dtype) * dilation - centre
    taps_xy = torch.stack(torch.meshgrid(window, window, indexing="ij"), -1).flatten(0, 1)
    pixels_xy = torch.stack(torch.meshgrid(axis(rows), axis(columns), indexing="ij")[::-1], -1)
    xy = pixels_xy[:, :, None, None] + offset_scale * (taps_xy + offset)
    height, width = size
    extent = torch.tensor([width, height], device=offset.device, dtype=offset.dtype)
    xy = torch.minimum(xy.nan_to_num(-2).clamp(min=-2), extent + 1)  # still outside, and no number is too large
    return ((2 * xy + 1) / extent - 1).permute(0, 3, 1, 2, 4, 5).reshape(B * G, rows * columns, taps, 2)


def _by_group(x, G):
    """``(B, H, W, C)`` to ``(B G, C / G, H, W)``."""
    return x.unflatten(-1, (G, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)


def _from_groups(x, G):
    """The inverse of `_by_group`."""
    return x.unflatten(0, (-1, G)).permute(0, 3, 4, 1, 2).flatten(3)


def deform_conv(x, offset, weight, stride, padding, dilation, offset_scale):
    """See `linzoo.ops.deform_conv`."""
    dtype = state_dtype(x.dtype)
    _, rows, columns, G, taps = weight.shape
    grid = _points(offset.to(dtype), x.shape[1:3], stride, padding, dilation, offset_scale)
    samples = F.grid_sample(_by_group(x.to(dtype), G), grid, align_corners=False)  # (B G, C / G, H' W', K K)
    weights = weight.to(dtype).permute(0, 3, 1, 2, 4).reshape(-1, 1, rows * columns, taps)
    return _from_groups((samples * weights).sum(-1).unflatten(-1, (rows, columns)), G).to(x.dtype)


def deform_conv_backward(dy, x, offset, weight, stride, padding, dilation, offset_scale):
    """Gradients of `deform_conv`: of x, offset and weight."""
    dtype = state_dtype(x.dtype)
    B, rows, columns, G, taps = weight.shape
    grid = _points(offset.to(dtype), x.shape[1:3], stride, padding, dilation, offset_scale)
    maps = _by_group(x.to(dtype), G)
    weights = weight.to(dtype).permute(0, 3, 1, 2, 4).reshape(-1, 1, rows * columns, taps)
    dy = _by_group(dy.to(dtype), G).flatten(2).unsqueeze(-1)  # (B G, C / G, H' W', 1)
    samples = F.grid_sample(maps, grid, align_corners=False)

    def unfold(per_tap):
        return per_tap.reshape(B, G, rows, columns, taps, *per_tap.shape[3:]).permute(
            0, 2, 3, 1, 4, *range(5, per_tap.dim() + 2)
        )

    dweight = unfold((dy * samples).sum(1))
    bilinear, zeros = 0, 0
    dmaps, dgrid = torch.ops.aten.grid_sampler_2d_backward(
        dy * weights, maps, grid, bilinear, zeros, False, [True, True]
    )
    height, width = x.shape[1:3]
    doffset = unfold(dgrid) * (offset_scale * 2 / torch.tensor([width, height], device=dy.device, dtype=dtype))
    return _from_groups(dmaps, G).to(x.dtype), doffset.to(offset.dtype), dweight.to(weight.dtype)
