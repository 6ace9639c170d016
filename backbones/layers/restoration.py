"""Shared parts of the restoration models: the frame around their blocks, windows, an MLP, names in published files.

Source: SwinIR (https://arxiv.org/abs/2108.10257). All of them use its frame.

Inner maps are channel-last (B, H, W, C); images are NCHW.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

from .checkpoint import rename, reshape_as
from .conv import Conv2dNHWC
from .pyramid import Pyramid
from .script import refuse_script

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K


def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], like: Tensor) -> Tensor:
    """Swin's attention mask for windows of a rolled map, added to the logits: 0, or -100 across a seam.

    Args:
        size: Height and width of the map, multiples of the window's.
        window: Height and width of a window.
        shift: By how much the map is rolled, up and to the left.
        like: A tensor with the result's device and dtype.

    Returns:
        ``(windows, tokens, tokens)``, the windows row by row.
    """

    def region(axis: int) -> Tensor:
        at = torch.arange(size[axis], device=like.device)
        return (at >= size[axis] - window[axis]).int() + (at >= size[axis] - shift[axis]).int()

    regions = 3 * region(0)[:, None] + region(1)
    regions = window_partition(regions[None, :, :, None], window).flatten(1)
    apart = regions[:, :, None] != regions[:, None]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


class ConvMlp(nn.Module):
    """MLP with an inner depthwise convolution of width `kernel_size`, for a map ``(B, H, W, C)``.

    ``u = GELU(W_1 x);  W_2 (u + GELU(DWConv(u)))``, or `gated`: ``[a, b] = u;  W_2 (a * DWConv(LN(b)))``.
    """

    def __init__(self, dim: int, hidden: int, gated: bool, kernel_size: int = 5, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        width = hidden // 2 if gated else hidden
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.norm = nn.LayerNorm(width, eps=1e-5, **dd) if gated else None
        self.conv = Conv2dNHWC(width, width, kernel_size, padding=kernel_size // 2, groups=width, **dd)
        self.fc2 = nn.Linear(width, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(self.fc1(x))
        if self.norm is None:
            return self.fc2(u + F.gelu(self.conv(u)))
        a, b = u.chunk(2, dim=-1)
        return self.fc2(a * self.conv(self.norm(b)))


class Group(nn.Module):
    """``x + conv(blocks(x))`` of a map ``(B, H, W, C)``."""

    def __init__(self, dim: int, blocks: list[nn.Module], device=None, dtype=None):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.conv = Conv2dNHWC(dim, dim, 3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = checkpoint(block, y) if self.grad_checkpointing else block(y)
        return x + self.conv(y)


class Head(nn.Module):
    """A map ``(B, H, W, C)`` to an image ``(B, out_chans, scale H, scale W)``.

    Args:
        dim: Channels C.
        out_chans: Channels of the image.
        scale: 1, 2, 3 or 4.
        direct: One convolution and one pixel shuffle. Otherwise a narrower map of 64 channels is shuffled; for a scale
            of 4, by 2 twice.
    """

    def __init__(self, dim: int, out_chans: int, scale: int, direct: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if direct:
            self.up = nn.Identity()
            self.conv = nn.Conv2d(dim, scale * scale * out_chans, 3, padding=1, **dd)
            self.shuffle = nn.PixelShuffle(scale)
            return
        width, layers = 64, []
        for factor in (2, 2) if scale == 4 else (scale,):
            layers += [nn.Conv2d(width, factor * factor * width, 3, padding=1, **dd), nn.PixelShuffle(factor)]
        narrow = nn.Conv2d(dim, width, 3, padding=1, **dd)
        self.up = nn.Sequential(narrow, nn.LeakyReLU(0.01), *layers)
        self.conv = nn.Conv2d(width, out_chans, 3, padding=1, **dd)
        self.shuffle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(self.up(x.permute(0, 3, 1, 2))))


@register_notrace_function  # FX cannot trace what depends on the image's size
def check_image(x: Tensor, in_chans: int) -> Tensor:
    """Returns x if it is ``(B, in_chans, H, W)``; else ValueError."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x: expected (B, {in_chans}, H, W), got {tuple(x.shape)}")
    return x


class RestorationFrame(nn.Module):
    """The frame of these models: takes images, returns images of `scale` times their size.

    ``f = conv(x);  head(f + conv(LN(groups(LN(f)))))``; with `residual` the head's output is added to the image.

    Args:
        block: Makes block j of group i: ``block(i, j)``.
        in_chans: Channels of the images.
        out_chans: Channels of the output; None for `in_chans`.
        dim: Inner channels C.
        depths: Blocks of each group.
        scale: Output size over input size, 1 to 4.
        direct: See `Head`.
        residual: Whether the network predicts the difference to the image.
        mean: Value that is subtracted from each channel of the image, and added back at the end.

    Raises:
        ValueError: the scale is not supported.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        block: Callable[[int, int], nn.Module],
        in_chans: int,
        out_chans: int | None,
        dim: int,
        depths: tuple[int, ...],
        scale: int,
        direct: bool,
        residual: bool,
        mean: tuple[float, ...] | None,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if scale not in (1, 2, 3, 4):
            raise ValueError(f"scale: expected 1, 2, 3 or 4, got {scale!r}")
        self.in_chans, self.num_classes = in_chans, out_chans or in_chans
        self.scale, self.residual = scale, residual
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [dict(num_chs=dim, reduction=1, module=f"stages.{i}") for i in range(len(depths))]
        self.mean = mean
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.stem_norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.stages = nn.ModuleList(
            Group(dim, [block(i, j) for j in range(depth)], **dd) for i, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.body = Conv2dNHWC(dim, dim, 3, padding=1, **dd)
        self.head = Head(dim, self.num_classes, scale, direct, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules():
            Pyramid._init_weights(module, needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scans' skips D: matrices here, but vectors in the published recipe."""
        return {name for name, _ in self.named_parameters() if name.endswith(".s6.D")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rate decay."""
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.conv", (9999,))]
        return dict(
            stem=r"^stem", blocks=[*([(r"^stages\.(\d+)", None)] if coarse else blocks), (r"^norm|^body", (99999,))]
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether blocks are recomputed in the backward pass."""
        for group in self.stages:
            group.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The convolution that outputs the image."""
        return self.head.conv

    def image_mean(self, x: Tensor) -> Tensor | float:
        """The value to subtract from images x, in a shape that fits them."""
        return 0.0 if self.mean is None else x.new_tensor(self.mean).view(1, -1, 1, 1)

    def pad(self, x: Tensor) -> Tensor:
        """Pads the image to a size that the blocks can process."""
        return x

    def forward_groups(self, x: Tensor) -> list[Tensor]:
        """Images ``(B, in_chans, H, W)`` to the stem's map and the groups' maps, each ``(B, H, W, C)``."""
        x = check_image(x, self.in_chans)
        x = self.pad(x - self.image_mean(x))
        stem = self.stem(x).permute(0, 2, 3, 1)
        maps = [self.stem_norm(stem)]
        for group in self.stages:
            maps.append(group(maps[-1]))
        return [stem, *maps[1:]]

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Fuses the maps of `forward_groups` into the map that the head reads ``(B, H, W, C)``."""
        return maps[0] + self.body(self.norm(maps[-1]))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the map that the head reads ``(B, H, W, C)``, as large as `pad` makes them."""
        return self.fuse(self.forward_groups(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The groups' maps, NCHW.

        Args:
            x: Images ``(B, in_chans, H, W)``.
            indices: The last n groups if int, all if None, else those listed.
            intermediates_only: Return only the maps.

        Returns:
            The output of `forward_features` and the list of maps; or only that list.
        """
        take_indices, _ = feature_take_indices(len(self.stages), indices)
        found = self.forward_groups(x)
        maps = [found[1 + i].permute(0, 3, 1, 2).contiguous() for i in take_indices]
        return maps if intermediates_only else (self.fuse(found), maps)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)``, white at 1, to restored ones ``(B, out_chans, scale H, scale W)``.

        Raises:
            ValueError: the number of channels is wrong, or the model does not support the size.
        """
        y = self.head(self.forward_features(x))[..., : self.scale * x.shape[2], : self.scale * x.shape[3]]
        return x + y if self.residual else y + self.image_mean(x)


# Published names for the parts around the blocks, and ours; their order matters.
BODY_NAMES = [
    (r"^(?:module|model|generator)\.", ""),
    (r"^conv_first\.", "stem."),
    (r"^patch_embed\.norm\.", "stem_norm."),
    (r"^layers\.(\d+)\.(?:residual_group\.)?(?:blocks|layers)\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.conv\.", r"stages.\1.conv."),
    (r"^conv_after_body\.", "body."),
    (r"^conv_before_upsample\.0\.", "head.up.0."),
    (r"^conv_last\.", "head.conv."),
]


def convert(state_dict: dict[str, Tensor], model: RestorationFrame, renames: list) -> dict[str, Tensor]:
    """An authors' state dict in our names, without BasicSR's wrapping."""
    wrapped: dict[str, Any] = state_dict
    state_dict = next((wrapped[name] for name in ("params_ema", "params", "state_dict") if name in wrapped), wrapped)
    if "stem.weight" in state_dict:
        return state_dict
    direct = "upsample.0.weight" in state_dict and "conv_last.weight" not in state_dict
    out = {}
    for key, value in state_dict.items():
        key = rename(key, renames)
        if key.startswith("upsample."):  # convolutions 0 and 2; ours come after the narrow one and its activation
            index, leaf = key.split(".")[1:]
            key = f"head.conv.{leaf}" if direct else f"head.up.{int(index) + 2}.{leaf}"
        out[key] = value
    return reshape_as(out, model)


def restoration_cfg(channels: int = 3, **kwargs) -> dict:
    """timm's pretrained configuration of a restoration model; images are in [0, 1], and models centre them."""
    return {
        "num_classes": channels,
        "input_size": (channels, 64, 64),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "first_conv": "stem",
        "classifier": ("head.conv", "head.up.2", "head.up.4"),  # layers that depend on the scale
        **kwargs,
    }
