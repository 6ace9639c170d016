"""ViT-Adapter (arXiv 2205.08534): a pyramid of maps around a backbone whose tokens keep one resolution."""

import functools
import importlib
import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn

from .padding import pad_to_multiple
from .script import refuse_script
from .simple_pyramid import STRIDES


@functools.cache
def compiled_attention():
    """mmcv's deformable attention for CUDA tensors; None if mmcv has no compiled operators."""
    try:
        if not hasattr(importlib.import_module("mmcv._ext"), "__file__"):  # the stand-in is no faster than ours
            return None
        return importlib.import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction.apply
    except ImportError:
        return None


def sampled_attention(value, shapes, locations, weights):
    """`deformable_attention` with PyTorch's operators."""
    out = 0
    for i, (level, shape) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes, strict=True)):
        maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)  # (B heads, C, H, W)
        grid = (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)  # (B heads, Q, points, 2)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (sampled * weights[:, :, :, i].transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)
    return out.unflatten(0, weights.shape[::2][:2]).permute(0, 3, 1, 2).flatten(2)


def deformable_attention(value, shapes, locations, weights):
    """Weighted sums of values sampled bilinearly from several maps (Deformable DETR, arXiv 2010.04159, eq. 3).

    Args:
        value: ``(B, L, heads, C)``, the levels' maps in raster order, one after the other.
        shapes: Heights and widths of the maps, L tokens in all.
        locations: ``(B, Q, heads, levels, points, 2)``, x and y in units of a map's width and height; samples outside
            the map are 0.
        weights: ``(B, Q, heads, levels, points)``.

    Returns:
        ``(B, Q, heads * C)``.
    """
    if value.is_cuda and compiled_attention() is not None:
        sizes = torch.tensor(shapes, device=value.device)
        starts = F.pad(sizes.prod(1).cumsum(0)[:-1], (1, 0))
        return compiled_attention()(value, sizes, starts, locations, weights, value.shape[0])
    return sampled_attention(value, shapes, locations, weights)


def as_tokens(maps):
    """Maps ``(B, C, H, W)`` to tokens ``(B, L, C)``, one map after the other."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)


def as_maps(tokens, shapes):
    """Inverse of `as_tokens`."""
    parts = tokens.transpose(1, 2).split([h * w for h, w in shapes], -1)
    return [x.unflatten(-1, shape) for x, shape in zip(parts, shapes, strict=True)]


def pixel_centres(shapes, device=None):
    """Centres of the pixels of maps of the given heights and widths, x and y in (0, 1): ``(pixels of all maps, 2)``."""
    centres = []
    for height, width in shapes:
        y, x = ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n for n in (height, width))
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(centres)


class MSDeformAttention(nn.Module):
    """Multi-scale deformable attention: each query samples `points` positions in every level near its own.

    Args:
        dim: Channels.
        levels: Number of maps that values come from.
        heads: Heads.
        points: Positions per level and head.
        ratio: Width of the values over `dim`.
    """

    def __init__(self, dim: int, levels: int, heads: int, points: int = 4, ratio: float = 1.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(dim * ratio)
        if inner % heads:
            raise ValueError(f"heads: expected a divisor of {inner} = dim * ratio, got {heads}")
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2, **dd)
        self.attention_weights = nn.Linear(dim, heads * levels * points, **dd)
        self.value_proj = nn.Linear(dim, inner, **dd)
        self.output_proj = nn.Linear(inner, dim, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Head h looks in direction h, with point p at p + 1 pixels; all points have the same weight."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(-1, 1)
        offsets = direction.view(-1, 1, 1, 2) * steps.expand(self.levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries, centres, values, shapes):
        """Queries ``(B, Q, C)`` at `centres` ``(Q, 2)`` read the tokens ``(B, L, C)`` of maps of the given shapes."""
        value = self.value_proj(values).unflatten(-1, (self.heads, -1))
        layout = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*layout, 2))
        weights = self.attention_weights(queries).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, layout[1:])
        sizes = offsets.new_tensor([(w, h) for h, w in shapes])[:, None]
        locations = centres.to(offsets.dtype)[:, None, None, None] + offsets / sizes
        y = deformable_attention(value, shapes, locations.to(value.dtype), weights.to(value.dtype))
        return self.output_proj(y)


class ConvFFN(nn.Module):
    """Linear, depthwise 3x3 convolution with the same weights for every level's map, GELU, linear."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        for linear in (self.fc1, self.fc2):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, c, shapes):
        return self.fc2(F.gelu(as_tokens([self.conv(x) for x in as_maps(self.fc1(c), shapes)])))


class Injector(nn.Module):
    """``x + gamma * attention(LN(x), LN(c))``: the backbone's tokens x read the pyramid c. gamma starts at 0."""

    def __init__(self, dim: int, heads: int, ratio: float, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = MSDeformAttention(dim, 3, heads, ratio=ratio, **dd)
        self.gamma = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.gamma)

    def forward(self, x, grid, c, shapes):
        centres = pixel_centres([grid], x.device)
        return x + self.gamma * self.attn(self.query_norm(x), centres, self.feat_norm(c), shapes)


class Extractor(nn.Module):
    """``c += attention(LN(c), LN(x)); c += ConvFFN(LN(c))``: the pyramid c reads the backbone's tokens x."""

    def __init__(self, dim: int, heads: int, ratio: float, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = MSDeformAttention(dim, 1, heads, ratio=ratio, **dd)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.ffn = ConvFFN(dim, dim // 4, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, c, shapes, x, grid):
        c = c + self.attn(self.query_norm(c), pixel_centres(shapes, c.device), self.feat_norm(x), [grid])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), shapes))


def _conv_norm_act(in_chans, out_chans, stride, **dd):
    conv = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False, **dd)
    return [conv, nn.BatchNorm2d(out_chans, **dd), nn.ReLU()]


class SpatialPrior(nn.Module):
    """Convolutions for details finer than patches: maps of `dim` channels at strides 4, 8, 16 and 32."""

    def __init__(self, in_chans: int, dim: int, width: int = 64, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        stem = _conv_norm_act(in_chans, width, 2, **dd)
        stem += [layer for _ in range(2) for layer in _conv_norm_act(width, width, 1, **dd)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, padding=1))
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Sequential(*_conv_norm_act(a, b, 2, **dd)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.projs = nn.ModuleList(nn.Conv2d(width, dim, 1, **dd) for width in widths)

    def forward(self, x):
        maps = [self.stem(x)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [None if proj is None else proj(y) for proj, y in zip(self.projs, maps, strict=True)]


class Interaction(nn.Module):
    """Surrounds a group of the backbone's blocks: an injector before it, extractors after it."""

    def __init__(
        self, dim: int, heads: int, ratio: float, extractors: int = 1, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.injector = Injector(dim, heads, ratio, **dd)
        self.extractors = nn.ModuleList(Extractor(dim, heads, ratio, drop_path, **dd) for _ in range(extractors))


class ViTAdapter(nn.Module):
    """Maps at strides 4, 8, 16 and 32 from an isotropic backbone of stride 16.

    Images are padded with 0 on the right and below to multiples of 32. The backbone's final norm is removed. In a run
    with several processes, convert the BatchNorms to synchronised ones, as the authors do.

    Args:
        backbone: A `linzoo.backbones.layers.Isotropic` without class token.
        heads: Heads of the deformable attention.
        ratio: Width of its values over the backbone's.
        own_tokens: Add the tokens after block group i to level i (the authors' segmentation models), instead of
            the last tokens to all levels (detection).
        drop_path: Stochastic depth of the extractors.

    Raises:
        ValueError: the backbone's depth is not a multiple of 4, its stride is not 16, or it has a class token.
    """

    __prepare_scriptable__ = refuse_script

    levels = 4

    def __init__(
        self,
        backbone: nn.Module,
        heads: int = 6,
        ratio: float = 1.0,
        own_tokens: bool = True,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        dim, depth = backbone.num_features, len(backbone.blocks)
        if depth % self.levels or backbone.stride != 16 or backbone.cls_token is not None:
            raise ValueError(
                f"backbone: expected a depth that is a multiple of {self.levels}, stride 16 and no class token, got "
                f"depth {depth}, stride {backbone.stride}, class token {backbone.cls_token is not None}"
            )
        self.in_chans, self.num_classes, self.num_features = backbone.in_chans, 0, dim
        self.own_tokens = own_tokens
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"norms.{i}") for i in range(self.levels)]
        self.backbone = backbone
        backbone.norm = nn.Identity()
        self.prior = SpatialPrior(backbone.in_chans, dim, **dd)
        self.level_embed = nn.Parameter(torch.empty(3, dim, **dd))
        self.interactions = nn.ModuleList(
            Interaction(dim, heads, ratio, 3 if i == self.levels - 1 else 1, drop_path, **dd)
            for i in range(self.levels)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2, **dd)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim, **dd) for _ in range(self.levels))
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset=True):
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        self.backbone.init_weights(needs_reset)
        nn.init.normal_(self.level_embed)

        def init(module):
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        for part in (self.prior, self.interactions, self.up, self.norms):
            part.apply(init)

    @torch.jit.ignore
    def no_weight_decay(self):
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        """Layer groups for layer-wise learning rate decay: patches, blocks in order, the adapter."""
        return dict(
            stem=r"^backbone\.(?:pos_embed|patch_embed)",
            blocks=[(r"^backbone\.blocks\.(\d+)", None), (r".*", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        self.backbone.set_grad_checkpointing(enable)

    def forward(self, x):
        """Images ``(B, 3, H, W)`` to four maps ``(B, C, H / 4, W / 4)`` to ``(B, C, H / 32, W / 32)``, rounded up.

        Images are padded to multiples of 32, and the maps cropped. The first map is None if it was pruned.
        """
        sides = x.shape[2:]
        x = pad_to_multiple(x, 32)
        fine, *maps = self.prior(x)
        shapes = [tuple(y.shape[2:]) for y in maps]
        c = as_tokens([y + e[:, None, None] for y, e in zip(maps, self.level_embed, strict=True)])
        x, grid = self.backbone.embed(x)
        tokens, size = [], len(self.backbone.blocks) // self.levels
        for i, interaction in enumerate(self.interactions):
            x = interaction.injector(x, grid, c, shapes)
            for block in self.backbone.blocks[i * size : (i + 1) * size]:
                x = self.backbone.run_block(block, x, grid)
            for extractor in interaction.extractors:
                c = extractor(c, shapes, x, grid)
            tokens.append(x)
        tokens = tokens if self.own_tokens else [x] * self.levels
        maps = as_maps(c, shapes)
        maps = [None if self.up is None else self.up(maps[0]) + fine, *maps]
        out = []
        for norm, y, t, stride in zip(self.norms, maps, tokens, STRIDES, strict=True):
            if y is None:  # pruned
                out.append(None)
                continue
            (t,) = as_maps(t, [grid])
            y = norm(y + F.interpolate(t, size=y.shape[2:], mode="bilinear", align_corners=False))
            height, width = ((side + stride - 1) // stride for side in sides)
            out.append(y[:, :, :height, :width])
        return out

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """The maps in `indices` (all if None, the last n if int), for `features_only`; `norm` and `stop_early` have no
        effect.

        Raises:
            ValueError: `output_fmt` is not 'NCHW'.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(self.levels, indices)
        maps = self.forward(x)
        taken = [maps[i] for i in take_indices]
        return taken if intermediates_only else (maps, taken)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Removes the little that the maps `indices` do not need; returns the indices, normalised."""
        taken, _ = feature_take_indices(self.levels, indices)
        for i in set(range(self.levels)) - set(taken):
            self.norms[i] = nn.Identity()
        if 0 not in taken:
            self.up, self.prior.projs[0] = None, None
        return taken


# The authors' names for the adapter's parts, and ours.
ADAPTER_NAMES = [
    (r"^spm\.stem\.", "prior.stem."),
    (r"^spm\.conv([234])\.", lambda m: f"prior.convs.{int(m[1]) - 2}."),
    (r"^spm\.fc([1234])\.", lambda m: f"prior.projs.{int(m[1]) - 1}."),
    (r"^(interactions\.\d+)\.extractor\.", r"\1.extractors.0."),
    (r"^(interactions\.\d+)\.extra_extractors\.(\d+)\.", lambda m: f"{m[1]}.extractors.{int(m[2]) + 1}."),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"^norm([1234])\.", lambda m: f"norms.{int(m[1]) - 1}."),
]
