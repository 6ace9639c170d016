"""timm's interface for all isotropic families (patch tokens of one width, as in a ViT)."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from torch import nn

from .padding import pad_to_multiple
from .script import refuse_script

# How pooling reduces tokens (B, M, C), without the class token.
POOLS = {
    "avg": lambda x: x.mean(1, keepdim=True),
    "max": lambda x: x.amax(1, keepdim=True),
    "avgmax": lambda x: (x.mean(1, keepdim=True) + x.amax(1, keepdim=True)) / 2,
    "catavgmax": lambda x: torch.stack([x.mean(1), x.amax(1)], 1),
}


def token_place(tokens, first=False):
    """Index of the class token in a sequence of `tokens`, which include it: in the middle, or with `first` in front."""
    return 0 if first else (tokens - 1) // 2


def without_token(x, first=False):
    """Tokens ``(B, M + 1, C)`` without the class token in their middle, or with `first` in front of them."""
    index = token_place(x.shape[1], first)
    before, _, after = x.split([index, 1, x.shape[1] - index - 1], dim=1)  # unlike slices, of sizes that exports know
    return torch.cat([before, after], dim=1)


def with_token(x, token, first=False):
    """Inserts `token` ``(B, 1, C)`` in the middle of ``(B, M, C)``, before token floor(M / 2), or in front of all."""
    index = 0 if first else x.shape[1] // 2
    before, after = x.split([index, x.shape[1] - index], dim=1)
    return torch.cat([before, token, after], dim=1)


@register_notrace_function  # FX cannot trace what depends on the image's size
def resize_pos_embed(pos_embed, old_grid, new_grid, class_token, antialias=True, first=False):
    """Resizes a position table ``(1, M, C)`` to another grid, bicubically; a class token's row stays as it is.

    The class token is in the middle, or with `first` in front.
    """
    known = all(isinstance(side, int) for side in new_grid)  # exported for any size: resize even at the traced one
    if known and tuple(old_grid) == tuple(new_grid):
        return pos_embed
    index = token_place(pos_embed.shape[1], first)
    rows = without_token(pos_embed, first) if class_token else pos_embed
    image = rows.float().mT.unflatten(2, tuple(old_grid))
    image = F.interpolate(image, tuple(new_grid), mode="bicubic", antialias=antialias)
    rows = image.flatten(2).mT.to(pos_embed.dtype)
    return with_token(rows, pos_embed[:, index : index + 1], first) if class_token else rows


@register_notrace_function
def patch_grid(height, width, patch_size, stride):
    """Number of patches along each side of an image.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    if height < patch_size or width < patch_size:
        raise ValueError(f"input size: expected at least {patch_size} x {patch_size}, got {height} x {width}")
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


class Isotropic(nn.Module):
    """Base of the isotropic families: patches, learned positions, blocks of one width, norm, linear classifier.

    A family's constructor calls `super().__init__` and sets `blocks` (an `nn.ModuleList`) and `norm`. Positions are
    interpolated for images whose size is not `img_size`.

    Args:
        img_size: Height and width (or one side) of the images that fit the position table.
        patch_size: Side of a patch.
        stride: Step between patches.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: 'token' (the class token); 'avg', 'max', 'avgmax' (their mean) or 'catavgmax' (both) of the patch
            tokens; or '' for none.
        dim: Width.
        depth: Blocks.
        class_token: Whether a class token is in the middle of the sequence (in front of it, if `token_first`).
        drop_rate: Dropout before the classifier.
        positions: Whether tokens get learned positions.

    Raises:
        ValueError: the pooling is unknown, or 'token' without a class token.
    """

    __prepare_scriptable__ = refuse_script

    pad_patches = False  # whether images are padded to whole patches
    antialias_pos_embed = True  # when positions are interpolated for a smaller image
    token_first = False  # whether the class token is in front of the others, not in their middle

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dim: int = 192,
        depth: int = 24,
        class_token: bool = True,
        drop_rate: float = 0.0,
        positions: bool = True,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.pre_head_size = dim
        self.patch_size, self.stride = patch_size, stride
        self.grid_size = patch_grid(*to_2tuple(img_size), patch_size, stride)
        self.feature_info = [dict(num_chs=dim, reduction=stride, module=f"blocks.{i}") for i in range(depth)]
        self.grad_checkpointing = False

        self.patch_embed = nn.Conv2d(in_chans, dim, patch_size, stride, **dd)
        tokens = self.grid_size[0] * self.grid_size[1] + int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim, **dd)) if positions else None
        self.global_pool = self._pool(global_pool)
        self.pre_head = nn.Identity()  # on each pooled vector
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @property
    def head_hidden_size(self):
        """Number of input channels of the classifier."""
        return self.pre_head_size * (2 if self.global_pool == "catavgmax" else 1)

    def _pool(self, global_pool):
        allowed = ["", *POOLS] + ["token"] * (self.cls_token is not None)
        if global_pool not in allowed:
            raise ValueError(f"global_pool: expected one of {allowed}, got {global_pool!r}")
        return global_pool

    def init_weights(self, needs_reset=True):
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                trunc_normal_(table, std=0.02)
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    @staticmethod
    def _init_weights(module, needs_reset=False):
        if needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self):
        return {name for name in ("pos_embed", "cls_token") if getattr(self, name) is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """Replaces the classifier; `global_pool` None keeps the pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._pool(global_pool)
        dd = get_device_dtype(self)
        head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head = head.train(self.training)

    def embed(self, x):
        """Images ``(B, 3, H, W)`` to tokens with positions ``(B, tokens, C)``, and their grid (height, width)."""
        if self.pad_patches:
            x = pad_to_multiple(x, self.patch_size)
        grid = patch_grid(x.shape[2], x.shape[3], self.patch_size, self.stride)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = with_token(x, self.cls_token.expand(x.shape[0], -1, -1), self.token_first)
        if self.pos_embed is None:
            return x, grid
        return x + self.positions(grid), grid

    def positions(self, grid):
        """The position table ``(1, tokens, C)`` for a grid."""
        has_token = self.cls_token is not None
        return resize_pos_embed(
            self.pos_embed, self.grid_size, grid, has_token, self.antialias_pos_embed, self.token_first
        )

    def fit_positions(self, table):
        """Fits a published position table ``(1, tokens, C)``, of a square grid, to the grid of this model."""
        if table.shape == self.pos_embed.shape:
            return table
        side, has_token = math.isqrt(table.shape[1]), self.cls_token is not None
        return resize_pos_embed(table, (side, side), self.grid_size, has_token, first=self.token_first)

    def without_token(self, x):
        """Tokens ``(B, tokens, C)`` without the class token, if there is one."""
        return x if self.cls_token is None else without_token(x, self.token_first)

    def run_block(self, block, x, grid):
        """Runs one block on tokens ``(B, tokens, C)``, with gradient checkpointing if enabled."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x, grid)
        return block(x, grid)

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """The blocks' patch tokens as maps.

        Args:
            x: Images ``(B, 3, H, W)``.
            indices: The last n blocks if int, all if None, else those listed.
            norm: Apply the final norm to each map.
            stop_early: Stop after the last requested block.
            output_fmt: 'NCHW', 'NHWC' or 'NLC'.
            intermediates_only: Return only the maps.

        Returns:
            The output of `forward_features` and the list of maps; or only that list.

        Raises:
            ValueError: `output_fmt` is none of these.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW', 'NHWC' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        maps = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self.run_block(block, x, grid)
            if i in take_indices:
                y = self.norm(x) if norm else x
                maps.append(self.without_token(y))
        if output_fmt != "NLC":
            maps = [y.unflatten(1, grid) for y in maps]
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Removes what the maps `indices` do not need; returns the indices, normalised."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x):
        """Images ``(B, 3, H, W)`` to normalised tokens ``(B, tokens, C)``, including the class token."""
        x, grid = self.embed(x)
        for block in self.blocks:
            x = self.run_block(block, x, grid)
        return self.norm(x)

    def forward_head(self, x, pre_logits=False):
        if self.global_pool == "token":
            x = x[:, token_place(x.shape[1], self.token_first)]
        elif self.global_pool:
            x = POOLS[self.global_pool](self.without_token(x))
        x = self.pre_head(x)
        x = self.head_drop(x.flatten(1) if self.global_pool in POOLS else x)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))
