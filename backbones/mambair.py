"""MambaIR.

Paper: MambaIR: A Simple Baseline for Image Restoration with State-Space Model (ECCV 2024) - https://arxiv.org/abs/2402.15648

Groups of blocks at the image's own resolution, between a convolution in and a convolution, or pixel shuffles, out. A
block mixes tokens by the four scans of VMamba's first version, and channels by convolutions with channel attention.
MambaIRv2 (`mambair_v2.py`) and opensr-mamba (`mambair_opensr.py`) stand in the same frame.

Maps are channel-last (B, H, W, C) inside; images are NCHW.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from torch import Tensor, nn

from .layers import SS2D, Conv2dNHWC, Pyramid
from .layers.checkpoint import SS2D_NAMES, rename, reshape_as
from .layers.script import refuse_script

__all__ = ["MambaIR", "RestorationFrame"]

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K


class ChannelAttention(nn.Module):
    """``x * sigmoid(W_2 ReLU(W_1 mean x))`` of a map ``(B, H, W, C)``, ``C // reduction`` wide inside."""

    def __init__(self, dim: int, reduction: int = 30, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // reduction, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()


class ConvMixer(nn.Sequential):
    """Channel mixer of a map ``(B, H, W, C)``: convolutions and channel attention (MambaIR, section 3.3).

    Two convolutions 3x3 through ``C // 3`` channels; `light`: through ``C // 2`` channels, each 1x1 and then depthwise
    3x3, the second one dilated.
    """

    def __init__(self, dim: int, light: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        if light:
            inner = dim // 2
            enter = [Conv2dNHWC(dim, inner, 1, **dd), Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, **dd)]
            leave = [Conv2dNHWC(inner, dim, 1, **dd),
                     Conv2dNHWC(dim, dim, 3, padding=2, dilation=2, groups=dim, **dd)]  # fmt: skip
        else:
            enter = [Conv2dNHWC(dim, dim // 3, 3, padding=1, **dd)]
            leave = [Conv2dNHWC(dim // 3, dim, 3, padding=1, **dd)]
        super().__init__(*enter, nn.GELU(), *leave, ChannelAttention(dim, **dd))


class Block(nn.Module):
    """``x = s_1 x + SS2D(LN(x));  x = s_2 x + ConvMixer(LN(x))`` with learnt scales s of each channel."""

    def __init__(
        self, dim: int, ratio: float, d_state: int, light: bool, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = SS2D(dim, ratio, d_state, gated=True, **dd)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = ConvMixer(dim, light, **dd)
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale1)
        nn.init.ones_(self.scale2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale1 + self.drop_path(self.mixer(self.norm1(x)))
        return x * self.scale2 + self.mlp(self.norm2(x))


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
        direct: One convolution and one pixel shuffle; else a narrower map of 64 channels is shuffled, by 2 and again by
            2 for a scale of 4.
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


@register_notrace_function  # FX cannot follow what depends on the image's size
def check_image(x: Tensor, in_chans: int) -> Tensor:
    """x, where it is ``(B, in_chans, H, W)``; else ValueError."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x: expected (B, {in_chans}, H, W), got {tuple(x.shape)}")
    return x


class RestorationFrame(nn.Module):
    """What the models of this family share: images in, images of `scale` times their size out.

    ``f = conv(x);  head(f + conv(LN(groups(LN(f)))))``; with `residual` the head's output is added to the image.

    Args:
        block: Makes block j of group i: ``block(i, j)``.
        in_chans: Channels of the images.
        out_chans: Channels of what comes out; None for `in_chans`.
        dim: Channels C inside.
        depths: Blocks of each group.
        scale: How much larger what comes out is, 1 to 4.
        direct: See `Head`.
        residual: The network predicts what is to be added to the image.
        mean: What is subtracted from each channel of the image, and added in the end.

    Raises:
        ValueError: another scale.
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
        """Layer groups for layer-wise decay of the learning rate."""
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.conv", (9999,))]
        return dict(
            stem=r"^stem", blocks=[*([(r"^stages\.(\d+)", None)] if coarse else blocks), (r"^norm|^body", (99999,))]
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass."""
        for group in self.stages:
            group.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The convolution that gives the image."""
        return self.head.conv

    def image_mean(self, x: Tensor) -> Tensor | float:
        """What is subtracted from images x, of a shape that fits them."""
        return 0.0 if self.mean is None else x.new_tensor(self.mean).view(1, -1, 1, 1)

    def pad(self, x: Tensor) -> Tensor:
        """The image as large as the blocks need it."""
        return x

    def forward_groups(self, x: Tensor) -> list[Tensor]:
        """Images ``(B, in_chans, H, W)`` to the stem's map and those of the groups, ``(B, H, W, C)`` each."""
        x = check_image(x, self.in_chans)
        x = self.pad(x - self.image_mean(x))
        stem = self.stem(x).permute(0, 2, 3, 1)
        maps = [self.stem_norm(stem)]
        for group in self.stages:
            maps.append(group(maps[-1]))
        return [stem, *maps[1:]]

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """What `forward_groups` gives to the map that the head reads ``(B, H, W, C)``."""
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
            intermediates_only: Return the maps alone.

        Returns:
            What `forward_features` gives and the list of maps; or that list.
        """
        take_indices, _ = feature_take_indices(len(self.stages), indices)
        found = self.forward_groups(x)
        maps = [found[1 + i].permute(0, 3, 1, 2).contiguous() for i in take_indices]
        return maps if intermediates_only else (self.fuse(found), maps)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)``, white at 1, to restored ones ``(B, out_chans, scale H, scale W)``.

        Raises:
            ValueError: another number of channels, or a size that the model does not take.
        """
        y = self.head(self.forward_features(x))[..., : self.scale * x.shape[2], : self.scale * x.shape[3]]
        return x + y if self.residual else y + self.image_mean(x)


class MambaIR(RestorationFrame):
    """MambaIR (arXiv 2402.15648), for images of any size.

    Args:
        in_chans: Channels of the images; RGB ones are centred at the mean of DIV2K.
        dim: Channels inside.
        depths: Blocks of each group.
        d_state: States per channel of the scans.
        ssm_ratio: Inner width of the scans over `dim`.
        scale: 2, 3 or 4 for super-resolution; 1 adds what the network predicts to the image.
        light: Depthwise convolutions as channel mixers, and a head of one convolution.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        dim: int = 180,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        scale: int = 1,
        light: bool = False,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        super().__init__(
            lambda i, j: Block(dim, ssm_ratio, d_state, light, rates[sum(depths[:i]) + j], **dd),
            in_chans,
            None,
            dim,
            depths,
            scale,
            direct=light or scale == 1,
            residual=scale == 1,
            mean=RGB_MEAN if in_chans == 3 else None,
            **dd,
        )


# The authors' names and ours; their order counts. Both versions, and opensr-mamba, have them.
FRAME_NAMES = [
    (r"^(?:module|model|generator)\.", ""),
    (r"^conv_first\.", "stem."),
    (r"^patch_embed\.norm\.", "stem_norm."),
    (r"^layers\.(\d+)\.residual_group\.(?:blocks|layers)\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.conv\.", r"stages.\1.conv."),
    (r"^conv_after_body\.", "body."),
    (r"^conv_before_upsample\.0\.", "head.up.0."),
    (r"^conv_last\.", "head.conv."),
    (r"\.self_attention\.", ".op."),
    *SS2D_NAMES,
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.skip_scale$", ".scale1"),
    (r"\.skip_scale2$", ".scale2"),
]
_RENAMES = [
    *FRAME_NAMES,
    (r"\.conv_blk\.cab\.(\d)\.attention\.1\.", r".mlp.\1.fc1."),
    (r"\.conv_blk\.cab\.(\d)\.attention\.3\.", r".mlp.\1.fc2."),
    (r"\.conv_blk\.cab\.", ".mlp."),
]


def convert(state_dict: dict[str, Tensor], model: RestorationFrame, renames: list) -> dict[str, Tensor]:
    """A state dict of the authors in our names; what BasicSR wraps around it is taken off."""
    wrapped: dict[str, Any] = state_dict
    state_dict = next((wrapped[name] for name in ("params_ema", "params", "state_dict") if name in wrapped), wrapped)
    if "stem.weight" in state_dict:
        return state_dict
    direct = "upsample.0.weight" in state_dict and "conv_last.weight" not in state_dict
    out = {}
    for key, value in state_dict.items():
        key = rename(key, renames)
        if key.startswith("upsample."):  # convolutions 0 and 2; ours stand behind the narrow one and its activation
            index, leaf = key.split(".")[1:]
            key = f"head.conv.{leaf}" if direct else f"head.up.{int(index) + 2}.{leaf}"
        out[key] = value
    return reshape_as(out, model)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RestorationFrame) -> dict[str, Tensor]:
    """Converts the published state dict to ours."""
    return convert(state_dict, model, _RENAMES)


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
        "classifier": ("head.conv", "head.up.2", "head.up.4"),  # what another scale does not share
        **kwargs,
    }


_ORIGIN = dict(origin_url="https://github.com/csguoh/MambaIR", paper_ids="arXiv:2402.15648", license="apache-2.0")
_RGB = ("light_x2", "light_x3", "light_x4", "sr_x2", "sr_x3", "sr_x4", "dn")

default_cfgs = generate_default_cfgs(
    {
        **{f"mambair_{name}": restoration_cfg(**_ORIGIN) for name in _RGB},
        "mambair_car": restoration_cfg(1, **_ORIGIN),
    }
)


def _create_mambair(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        MambaIR,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes",),  # what comes out has the channels of what goes in
        **kwargs,
    )


LIGHT = dict(dim=60, depths=(6, 6, 6, 6), d_state=10, ssm_ratio=1.2, light=True)


@register_model
def mambair_light_x2(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, to 2 times the size."""
    return _create_mambair("mambair_light_x2", pretrained, **dict(dict(LIGHT, scale=2), **kwargs))


@register_model
def mambair_light_x3(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, to 3 times the size."""
    return _create_mambair("mambair_light_x3", pretrained, **dict(dict(LIGHT, scale=3), **kwargs))


@register_model
def mambair_light_x4(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR, light, to 4 times the size."""
    return _create_mambair("mambair_light_x4", pretrained, **dict(dict(LIGHT, scale=4), **kwargs))


@register_model
def mambair_sr_x2(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR to 2 times the size."""
    return _create_mambair("mambair_sr_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def mambair_sr_x3(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR to 3 times the size."""
    return _create_mambair("mambair_sr_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def mambair_sr_x4(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR to 4 times the size."""
    return _create_mambair("mambair_sr_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def mambair_dn(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR that removes noise from colour images."""
    return _create_mambair("mambair_dn", pretrained, **dict(dict(ssm_ratio=1.2), **kwargs))


@register_model
def mambair_car(pretrained: bool = False, **kwargs) -> MambaIR:
    """MambaIR that removes traces of JPEG compression from grey images."""
    return _create_mambair("mambair_car", pretrained, **dict(dict(in_chans=1, ssm_ratio=1.2), **kwargs))
