"""OccRWKV.

Paper: OccRWKV: Rethinking Efficient 3D Semantic Occupancy Prediction with Linear Complexity (ICRA 2025)
- https://arxiv.org/abs/2409.19987

From the voxels that a LiDAR sweep hits, it predicts a class for every voxel of the scene. Three branches have blocks of
Vision-RWKV on maps seen from above (bird's-eye views, BEV). Sem-RWKV reads only the occupied voxels, Geo-RWKV all
voxels. BEV-RWKV is a U-Net of maps, which the other two feed.

Voxels are (B, ..., X, Y, Z) at input and output; maps are NCHW with H along Y and W along X, as in the authors' code.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import ChannelMix, RWKVBlock, SpatialMix
from .layers.checkpoint import rename, reshape_as, unwrap_state_dict
from .layers.memory_format import AnyMemoryFormat
from .layers.rwkv import RWKV_NAMES, stack_mixes
from .layers.script import refuse_script

__all__ = ["BEVUNet", "OccRWKV"]


class BEVBlock(RWKVBlock):
    """A block of Vision-RWKV on a map ``(B, C, H, W)``: without layer scales, with a norm of the residual stream."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        # Initialised as in the authors' code: every block as the first of 18.
        super().__init__(dim, SpatialMix(dim, 0, 18, **dd), ChannelMix(dim, None, 0, 18, **dd), first_norm=True, **dd)

    def forward(self, x):
        grid = x.shape[2:]
        return super().forward(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, grid)


# --- BEV-RWKV -------------------------------------------------------------------------------------------------------


class DoubleConv(nn.Sequential):
    """Two times a 3x3 convolution, BatchNorm and LeakyReLU 0.01."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(dim, dim_out, 3, padding=1, **dd),
            nn.BatchNorm2d(dim_out, **dd),
            nn.LeakyReLU(),
            nn.Conv2d(dim_out, dim_out, 3, padding=1, **dd),
            nn.BatchNorm2d(dim_out, **dd),
            nn.LeakyReLU(),
        )


class Down(nn.Sequential):
    """Half the size: 2x2 max pooling and a `DoubleConv`."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        super().__init__(nn.MaxPool2d(2), DoubleConv(dim, dim_out, device=device, dtype=dtype))


class Up(nn.Module):
    """Bilinear upsampling to twice the size, concatenation with the skip, and a `DoubleConv`."""

    def __init__(self, dim: int, skip: bool, dim_out: int, device=None, dtype=None):
        super().__init__()
        self.conv = DoubleConv(skip + dim, dim_out, device=device, dtype=dtype)

    def forward(self, x, skip):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        height, width = (a - b for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.conv(torch.cat([skip, x], 1))


class BEVFusion(nn.Module):
    """The three branches' maps, weighted by channel: ``sum_i f_i sigmoid(W_i mean(f_i))``.

    Args:
        dim: Channels of the BEV branch's map. The others have width `dim_in` and are brought to `dim` first.
    """

    def __init__(self, dim: int, dim_in: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.adapter_sem = nn.Conv2d(dim_in, dim, 1, **dd)
        self.adapter_com = nn.Conv2d(dim_in, dim, 1, **dd)
        self.attention = nn.ModuleList(nn.Conv2d(dim, dim, 1, **dd) for _ in range(3))

    def forward(self, bev, sem, com):
        maps = bev, self.adapter_sem(sem), self.adapter_com(com)
        pairs = zip(maps, self.attention, strict=True)
        return sum(x * attention(x.mean((2, 3), keepdim=True)).sigmoid() for x, attention in pairs)


class BEVStage(nn.Module):
    """A level of the U-Net: half the size, an RWKV block, and fusion with the other branches' maps.

    Args:
        dim, dim_out: Channels of the input map and of the output map.
        fused: Whether there are other branches' maps, with `dim_out / 2` channels.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, dim: int = 64, dim_out: int = 128, fused: bool = True, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes = 0
        self.down = Down(dim, dim_out, **dd)
        self.block = BEVBlock(dim_out, **dd)
        self.fusion = BEVFusion(dim_out, dim_out // 2, **dd) if fused else None

    def forward(self, x, sem=None, com=None):
        """Map ``(B, dim, Y, X)`` and other maps of half its size with `dim_out / 2` channels, to `dim_out` channels."""
        x = self.block(self.down(x))
        return x if self.fusion is None else self.fusion(x, sem, com)


class BEVUNet(nn.Module):
    """BEV-RWKV: a U-Net of maps from above, with an RWKV block after each level; the other branches are fused into it.

    Args:
        height: Voxels Z along the height.
        in_chans: Channels of the input map; None for ``2 * height``.
        num_classes: Classes, including 0 for empty voxels.
        dims: Widths at strides 1, 2, 4, 8 and 16; the other branches' maps at 2, 4 and 8 have half as many channels.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        height: int = 32,
        in_chans: int | None = None,
        num_classes: int = 20,
        dims: tuple[int, ...] = (64, 128, 256, 512, 512),
        drop_rate: float = 0.5,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.height, self.num_classes = height, num_classes
        in_chans = in_chans or 2 * height
        self.norm = nn.BatchNorm2d(in_chans, **dd)
        self.stem = DoubleConv(in_chans, dims[0], **dd)
        self.stages = nn.ModuleList(BEVStage(dims[i], dims[i + 1], fused=i < 3, **dd) for i in range(4))
        # From the coarsest level up: channels from below, of the skip, and of the output.
        widths = zip(
            (dims[4], dims[3], dims[2], dims[1]),
            (dims[3], dims[2], dims[1], dims[0]),
            (dims[3], dims[2], dims[1], dims[1]),
            strict=True,
        )
        self.ups = nn.ModuleList(Up(*w, **dd) for w in widths)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Conv2d(dims[1], num_classes * height, 1, **dd)

    def forward(self, x, sem, com):
        """Logits ``(B, classes, X, Y, Z)``.

        Args:
            x: Map ``(B, C, Y, X)``.
            sem, com: The semantic and the completion branch's maps at strides 2, 4 and 8.
        """
        skips = [self.stem(self.norm(x))]
        for i, stage in enumerate(self.stages):
            skips.append(stage(skips[-1], sem[i], com[i]) if i < 3 else stage(skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        x = self.head(self.drop(x)).unflatten(1, (self.num_classes, self.height))
        return x.permute(0, 1, 4, 3, 2)


# --- Geo-RWKV -------------------------------------------------------------------------------------------------------


class ResidualConv3d(nn.Module):
    """``ReLU(Conv(ReLU(Conv(x))) + shortcut(x))`` with 3x3x3 kernels; the shortcut is 1x1x1 if the width changes."""

    def __init__(self, dim: int, dim_out: int, dilation: int = 1, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv3d(dim, dim_out, 3, padding=dilation, dilation=dilation, **dd)
        self.conv2 = nn.Conv3d(dim_out, dim_out, 3, padding=dilation, dilation=dilation, **dd)
        self.shortcut = nn.Identity() if dim == dim_out else nn.Conv3d(dim, dim_out, 1, **dd)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class CompletionBranch(nn.Module):
    """Geo-RWKV: dense convolutions of the occupancy at strides 2, 4 and 8, each seen from above with an RWKV block.

    Args:
        height: Voxels Z along the height.
        widths: Channels of the output maps.
        dim: Channels of voxels at stride 2; twice and four times as many at 4 and 8.
    """

    def __init__(self, height: int, widths: Sequence[int], dim: int = 16, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        dims = [dim, 2 * dim, 4 * dim]
        folded = dim * height // 2  # channels times height, at each stride
        self.stem = nn.Conv3d(1, dim, 7, 2, padding=3, **dd)
        self.stages = nn.ModuleList(
            ResidualConv3d(a, b, dilation, **dd) for a, b, dilation in zip([dim, *dims], dims, (1, 1, 2), strict=False)
        )
        self.reduces = nn.ModuleList(
            nn.Identity() if folded == width else nn.Conv2d(folded, width, 1, **dd) for width in widths
        )
        self.blocks = nn.ModuleList(BEVBlock(width, **dd) for width in widths)
        self.auxiliary = nn.ModuleList(nn.Conv3d(d, 2, 1, **dd) for d in dims)

    def forward(self, occupancy):
        """Occupancy ``(B, 1, X, Y, Z)`` to maps ``(B, C, Y / s, X / s)`` and features ``(B, D, X / s, Y / s, Z / s)``,
        both for s = 2, 4, 8.
        """
        x, maps, features = F.relu(self.stem(occupancy)), [], []
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool3d(x, 2) if i else x)
            features.append(x)
            seen = x.permute(0, 1, 4, 3, 2).flatten(1, 2)  # (B, D Z, Y, X)
            maps.append(self.blocks[i](self.reduces[i](seen)))
        return maps, features


# --- Sem-RWKV -------------------------------------------------------------------------------------------------------


def flat_index(coordinates, size):
    """Index of each of ``(N, 4)`` coordinates (sample, x, y, z) in a dense array ``(B, X, Y, Z)`` of `size`."""
    b, x, y, z = coordinates.unbind(1)
    return ((b * size[1] + x) * size[2] + y) * size[3] + z


def coarsen(coordinates, size, factor):
    """Cells with sides of `factor` voxels that hold at least one of ``(N, 4)`` voxels.

    Returns:
        Their coordinates ``(M, 4)``, sorted; the cell of each voxel ``(N,)``; the coarse grid's size.
    """
    divisor = coordinates.new_tensor([1, factor, factor, factor])
    size = (size[0], *((n + factor - 1) // factor for n in size[1:]))
    index, cell = torch.unique(flat_index(coordinates // divisor, size), return_inverse=True)
    return torch.stack(torch.unravel_index(index, size), 1), cell, size


def cell_mean(features, cell, count):
    """Mean of ``(N, C)`` features in each of `count` cells, none of them empty; summed in float32 or wider."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    total = wide.new_zeros(count, wide.shape[1]).index_add(0, cell, wide)
    return (total / cell_count(cell, count)[:, None]).to(features.dtype)


def cell_count(cell, count):
    """Number of voxels in each of `count` cells."""
    return torch.zeros(count, dtype=torch.long, device=cell.device).index_add(0, cell, torch.ones_like(cell))


def cell_max(features, cell, count):
    """Maximum of ``(N, C)`` features in each of `count` cells, none of them empty."""
    out = features.new_zeros(count, features.shape[1])
    return out.scatter_reduce(0, cell[:, None].expand_as(features), features, "amax", include_self=False)


def from_above(features, coordinates, size):
    """The largest of ``(N, C)`` features in each column, 0 if it is empty, as a map ``(B, C, Y, X)``."""
    batch, X, Y, _ = size
    b, x, y, _ = coordinates.unbind(1)
    column = (b * Y + y) * X + x
    out = features.new_zeros(batch * Y * X, features.shape[1])
    out = out.scatter_reduce(0, column[:, None].expand_as(features), features, "amax", include_self=False)
    return out.view(batch, Y, X, -1).permute(0, 3, 1, 2)


def neighbours(coordinates, size):
    """Rows of the 27 voxels around each of ``(N, 4)``, with itself as the 14th: ``(N, 27)``; N for missing ones."""
    padded = (size[0], *(n + 2 for n in size[1:]))
    table = torch.full((padded[0] * padded[1] * padded[2] * padded[3],), len(coordinates), device=coordinates.device)
    centre = flat_index(coordinates + coordinates.new_tensor([0, 1, 1, 1]), padded)
    table[centre] = torch.arange(len(coordinates), device=coordinates.device)
    step = torch.arange(-1, 2, device=coordinates.device)
    dx, dy, dz = torch.meshgrid(step, step, step, indexing="ij")
    offset = (dx * padded[2] + dy) * padded[3] + dz
    return table[centre[:, None] + offset.flatten()]


class SubmanifoldConv3d(nn.Module):
    """3x3x3 convolution computed only at occupied voxels (arXiv 1711.10275)."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(27 * dim, dim_out, bias=False, device=device, dtype=dtype)

    def forward(self, x, around):
        """Features ``(N, C)`` and `neighbours` to features ``(N, D)``."""
        return self.linear(F.pad(x, (0, 0, 0, 1))[around].flatten(1))


class SparseResidual(nn.Module):
    """Two submanifold convolutions with BatchNorm and LeakyReLU 0.1, and a linear shortcut."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = SubmanifoldConv3d(dim, dim_out, **dd)
        self.norm1 = nn.BatchNorm1d(dim_out, **dd)
        self.conv2 = SubmanifoldConv3d(dim_out, dim_out, **dd)
        self.norm2 = nn.BatchNorm1d(dim_out, **dd)
        self.shortcut = nn.Sequential(nn.Linear(dim, dim_out, bias=False, **dd), nn.BatchNorm1d(dim_out, **dd))

    def forward(self, x, around):
        y = F.leaky_relu(self.norm1(self.conv1(x, around)), 0.1)
        return F.leaky_relu(self.norm2(self.conv2(y, around)) + self.shortcut(x), 0.1)


class MultiScalePooling(nn.Module):
    """Adds to each voxel the means of neighbourhoods of several sizes; a gate chooses among them by channel.

    ``x + W (sum_s softmax_s(G_s LeakyReLU(R sum_s y_s)) y_s)`` with y_s a linear map of the mean over cells with sides
    of s voxels: selective kernels (arXiv 1903.06586), voxel by voxel.
    """

    scales = (2, 4, 6, 8)

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(dim, dim, **dd) for _ in self.scales)
        self.reduce = nn.Linear(dim, dim // 2, **dd)
        self.gates = nn.ModuleList(nn.Linear(dim // 2, dim, **dd) for _ in self.scales)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x, coordinates, size):
        means = []
        for scale, linear in zip(self.scales, self.maps, strict=True):
            coarse, cell, _ = coarsen(coordinates, size, scale)
            means.append(linear(cell_mean(x, cell, len(coarse)))[cell])
        means = torch.stack(means)
        hidden = F.leaky_relu(self.reduce(means.sum(0)), 0.1)
        weights = torch.stack([gate(hidden) for gate in self.gates]).softmax(0)
        return x + self.proj((weights * means).sum(0))


class SemanticBranch(nn.Module):
    """Sem-RWKV: only occupied voxels, at strides 2, 4 and 8; seen from above, with an RWKV block on each map.

    Args:
        dim: Channels of the voxels at stride 1.
        widths: Channels at strides 2, 4 and 8.
        num_classes: Classes of the auxiliary heads, without the class of empty voxels.
    """

    def __init__(self, dim: int, widths: Sequence[int], num_classes: int = 19, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        pairs = list(zip([dim, *widths], widths, strict=False))
        self.residuals = nn.ModuleList(SparseResidual(a, b, **dd) for a, b in pairs)
        self.poolings = nn.ModuleList(MultiScalePooling(b, **dd) for b in widths)
        self.blocks = nn.ModuleList(BEVBlock(b, **dd) for b in widths)
        self.auxiliary = nn.ModuleList(
            nn.Sequential(
                nn.Linear(b, b // 2, **dd),
                nn.BatchNorm1d(b // 2, **dd),
                nn.LeakyReLU(0.1),
                nn.Linear(b // 2, num_classes, **dd),
            )
            for b in widths
        )

    def forward(self, x, coordinates, size):
        """Features ``(N, C)`` of voxels ``(N, 4)`` to maps, and each stride's features and coordinates."""
        maps, voxels = [], []
        for residual, pooling, block in zip(self.residuals, self.poolings, self.blocks, strict=True):
            coordinates, cell, size = coarsen(coordinates, size, 2)
            x = cell_max(x, cell, len(coordinates))
            x = pooling(residual(x, neighbours(coordinates, size)), coordinates, size)
            maps.append(block(from_above(x, coordinates, size)))
            voxels.append((x, coordinates))
        return maps, voxels


class VoxelEncoder(nn.Module):
    """Features of occupied voxels, computed from their positions, modelled on the authors' encoder of points.

    For each voxel, and for cells with sides of 2 and 4 voxels: its place in the scene, its offset from the mean of its
    cell's voxels, and the cell's share of them. Linear maps of both are multiplied as in the authors' code and
    concatenated with the cell's maximum; a linear map of it all follows.
    """

    scales = (2, 4)

    def __init__(self, dim: int = 32, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        half = dim // 2
        self.place = nn.ModuleList(nn.Linear(7, half, **dd) for _ in self.scales)
        self.offset = nn.ModuleList(nn.Linear(4, half, **dd) for _ in self.scales)
        self.fuse = nn.Sequential(nn.Linear(2 * dim, dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd))

    def forward(self, coordinates, size):
        """Voxels ``(N, 4)`` to features ``(N, C)``."""
        dtype = self.place[0].weight.dtype
        xyz = coordinates[:, 1:].to(torch.promote_types(dtype, torch.float32))
        place = 2 * (xyz + 0.5) / xyz.new_tensor(size[1:]) - 1
        features = []
        for scale, linear, gate in zip(self.scales, self.place, self.offset, strict=True):
            coarse, cell, _ = coarsen(coordinates, size, scale)
            share = cell_count(cell, len(coarse))[cell, None] / scale**3
            near = torch.cat([(xyz - cell_mean(xyz, cell, len(coarse))[cell]) / scale, share], 1)
            x = linear(torch.cat([place, near], 1).to(dtype)) * gate(near.to(dtype))
            features += [x, cell_max(x, cell, len(coarse))[cell]]
        return self.fuse(torch.cat(features, 1))


class OccRWKV(AnyMemoryFormat):
    """OccRWKV (arXiv 2409.19987) on voxels.

    The authors encode the sweep's points. Here a voxel's features come from the occupied voxels around it. The sparse
    convolutions are index look-ups and matrix products, in PyTorch only.

    Args:
        height: Voxels Z along the height, a multiple of 8.
        num_classes: Classes, including 0 for empty voxels.
        dims: Widths of the U-Net at strides 1, 2, 4, 8 and 16.
        voxel_dim: Channels of the voxel features.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: `height` is not a multiple of 8.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        height: int = 32,
        num_classes: int = 20,
        dims: tuple[int, ...] = (64, 128, 256, 512, 512),
        voxel_dim: int = 32,
        drop_rate: float = 0.5,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if height < 8 or height % 8:
            raise ValueError(f"height: expected a multiple of 8, got {height}")
        self.height, self.num_classes, self.in_chans = height, num_classes, 1
        widths = [dim // 2 for dim in dims[1:4]]
        self.encoder = VoxelEncoder(voxel_dim, **dd)
        self.semantic = SemanticBranch(voxel_dim, widths, num_classes - 1, **dd)
        self.completion = CompletionBranch(height, widths, **dd)
        self.bev = BEVUNet(height, height + voxel_dim, num_classes, dims, drop_rate, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset=True):
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self):
        """The decays and bonuses of the WKV."""
        return {name for name, _ in self.named_parameters() if name.endswith((".decay", ".bonus"))}

    def _check(self, voxels):
        batch, one, *size = voxels.shape if voxels.dim() == 5 else [0] * 5
        if one != 1 or not batch or size[2] != self.height or any(n < 16 or n % 16 for n in size[:2]):
            raise ValueError(
                f"voxels: expected (B, 1, X, Y, {self.height}), X and Y multiples of 16, got {tuple(voxels.shape)}"
            )
        occupied = voxels[:, 0] > 0
        empty = ~occupied.flatten(1).any(1)
        if empty.any():
            sample = empty.nonzero()[0].item()
            raise ValueError(f"voxels: expected occupied voxels (> 0) in every sample, got none in sample {sample}")
        return occupied

    def branches(self, voxels):
        """Voxels ``(B, 1, X, Y, Z)`` to logits and the inputs of the auxiliary training losses.

        Returns:
            Logits ``(B, classes, X, Y, Z)``; for strides 2, 4, 8 pairs of logits ``(N, classes - 1)`` of the occupied
            cells, class 1 first, and their coordinates ``(N, 4)`` (sample, x, y, z); for the same strides logits of
            empty and occupied ``(B, 2, X / s, Y / s, Z / s)``.

        Raises:
            ValueError: the shape is wrong, or a sample has no occupied voxels.
        """
        occupied = self._check(voxels)
        coordinates, size = occupied.nonzero(), tuple(occupied.shape)
        features = self.encoder(coordinates, size)
        occupancy = occupied[:, None].to(features.dtype)
        sem, cells = self.semantic(features, coordinates, size)
        com, dense = self.completion(occupancy)
        seen = torch.cat([occupancy[:, 0].permute(0, 3, 2, 1), from_above(features, coordinates, size)], 1)
        logits = self.bev(seen, sem, com)
        semantic = [(head(x), where) for head, (x, where) in zip(self.semantic.auxiliary, cells, strict=True)]
        completion = [head(x) for head, x in zip(self.completion.auxiliary, dense, strict=True)]
        return logits, semantic, completion

    def forward(self, voxels):
        """Voxels ``(B, 1, X, Y, Z)``, occupied if above 0, to logits ``(B, classes, X, Y, Z)``.

        Raises:
            ValueError: the shape is wrong, or a sample has no occupied voxels.
        """
        return self.branches(voxels)[0]


_RENAMES = [
    (r"^inc\.conv\.0\.", "norm."),
    (r"^inc\.conv\.1\.conv\.", "stem."),
    (r"^down(\d)\.mpconv\.1\.conv\.", lambda m: f"stages.{int(m[1]) - 1}.down.1."),
    (r"^rwkv_block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.block."),
    (r"^bev_fusions\.(\d)\.", r"stages.\1.fusion."),
    (r"\.attention_(bev|sem|com)\.1\.", lambda m: f".attention.{('bev', 'sem', 'com').index(m[1])}."),
    (r"^up(\d)\.conv\.conv\.", lambda m: f"ups.{int(m[1]) - 1}.conv."),
    (r"^outc\.conv\.", "head."),
    *RWKV_NAMES,
]


def checkpoint_filter_fn(state_dict, model):
    """Converts the authors' state dict of the BEV U-Net, or of parts of it, to that of `BEVUNet` or of a `BEVStage`.

    The blocks of the decoder, which their forward pass never calls, are left out.
    """
    state_dict = unwrap_state_dict(state_dict)
    out = {key: value for key, value in state_dict.items() if not key.startswith("rwkv_block_up")}
    out = stack_mixes(out, ["spatial_mix_k", "spatial_mix_v", "spatial_mix_r"])
    out = stack_mixes(out, ["spatial_mix_k", "spatial_mix_r"])
    out = {rename(key, _RENAMES): value for key, value in out.items()}
    if isinstance(model, BEVStage):
        out = {re.sub(r"^stages\.\d\.", "", key): value for key, value in out.items()}
    return reshape_as(out, model)


def _cfg(first_conv, classifier, num_classes=20):
    return dict(
        num_classes=num_classes,
        input_size=None,  # timm only knows image sizes
        first_conv=first_conv,
        classifier=classifier,
        origin_url="https://github.com/jmwang0117/OccRWKV",
        paper_ids="arXiv:2409.19987",
    )


default_cfgs = generate_default_cfgs(
    {
        "occrwkv": _cfg("completion.stem", "bev.head"),
        "occrwkv_bev_unet": _cfg("stem.0", "head"),
        "occrwkv_bev_block": _cfg("down.1.0", None, 0),
    }
)


def _create_part(cls, variant, pretrained, *without, **kwargs):
    kwargs |= dict(pretrained_filter_fn=checkpoint_filter_fn, kwargs_filter=("global_pool", *without))
    return build_model_with_cfg(cls, variant, pretrained, **kwargs)


@register_model
def occrwkv_bev_unet(pretrained=False, **kwargs):
    """Only OccRWKV's BEV branch: maps from above and the other branches' maps to classes of voxels."""
    return _create_part(BEVUNet, "occrwkv_bev_unet", pretrained, **kwargs)


@register_model
def occrwkv_bev_block(pretrained=False, **kwargs):
    """A level of OccRWKV's BEV branch, which fuses its map with the other branches' maps."""
    return _create_part(BEVStage, "occrwkv_bev_block", pretrained, "num_classes", "in_chans", **kwargs)


@register_model
def occrwkv(pretrained=False, **kwargs):
    """OccRWKV on SemanticKITTI's voxels."""
    if kwargs.pop("in_chans", 1) != 1:
        raise ValueError("in_chans: OccRWKV takes occupied and empty voxels, expected 1")
    return build_model_with_cfg(OccRWKV, "occrwkv", pretrained, kwargs_filter=("global_pool", "in_chans"), **kwargs)
