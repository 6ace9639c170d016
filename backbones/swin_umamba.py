"""Swin-UMamba and Swin-UMamba-D.

Paper: Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining (MICCAI 2024) - https://arxiv.org/abs/2402.03302

Segmenters for medical images around the encoder of the first VMamba-T, starting from its ImageNet weights. Swin-UMamba
has a convolutional stem, convolutional skips at every size and a convolutional decoder. Swin-UMamba-D has patches,
plain skips and a decoder of VMamba's blocks. Both have heads at four sizes for deep supervision.

The encoder's maps are channel-last (B, H, W, C), the rest is channel-first.
"""

from functools import partial

import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from .layers import SS2D, Stage
from .layers.checkpoint import SS2D_NAMES, rename, reshape_as
from .layers.dense import DenseModel, ResBlock, UpBlock, heads_of_other_classes, unwrap_nnunet
from .layers.vss import PatchExpand, VSSBlock

__all__ = ["SwinUMamba", "SwinUMambaD"]

Mixer = partial(SS2D, ratio=2.0, d_state=16, gated=True)


def to_nchw(x: Tensor) -> Tensor:
    """``(B, H, W, C)`` to ``(B, C, H, W)``."""
    return x.permute(0, 3, 1, 2)


class VSSEncoder(DenseModel):
    """The encoder of both: stages of VMamba's first blocks with patch merging between; the first is at stride 4."""

    def make_stages(self, dims: tuple[int, ...], depths: tuple[int, ...], drop_path_rate: float, **dd) -> nn.ModuleList:
        """The stages; after them the maps have strides 4, 8 ..."""
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        return nn.ModuleList(
            Stage(
                [VSSBlock(dim, Mixer, rate, **dd) for rate in rates[i]],
                PatchMerging(dims[i - 1], dim, **dd) if i else None,
            )
            for i, dim in enumerate(dims)
        )

    def run_stages(self, x: Tensor) -> list[Tensor]:
        """The map at stride 4 ``(B, H, W, C)`` to the stages' outputs, channel-first."""
        outputs = []
        for stage in self.stages:
            outputs.append(x := stage(x))
        return [to_nchw(y) for y in outputs]

    def init_from_classifier(self, state_dict: dict[str, Tensor]) -> None:
        """Starts from a classifier, VMamba-T of the first version, as the authors do.

        The stages take the tensors with their names. The patch embedding is copied whole if the shapes match (D with
        three channels). Otherwise only the bias of its norm is copied, as in the authors' code.

        Args:
            state_dict: The result of `timm.create_model("vmamba_t_v0").state_dict()`.

        Raises:
            ValueError: a tensor of the stages is absent or has another shape.
        """
        own, start = self.state_dict(), {}
        found = {key.replace(".norm1.", ".norm."): value for key, value in state_dict.items()}
        for key in own:
            if key.startswith("stages."):
                if key not in found or found[key].shape != own[key].shape:
                    got = tuple(found[key].shape) if key in found else "none"
                    raise ValueError(f"state_dict: expected {key!r} of shape {tuple(own[key].shape)}, got {got}")
                start[key] = found[key]
        embed = {key: found[key.replace("embed.", "stem.")] for key in own if key.startswith("embed.")}
        if any(embed[key].shape != own[key].shape for key in embed):
            embed = {key: value for key, value in embed.items() if key == "embed.norm.bias"}
        self.load_state_dict(start | embed, strict=False)


class SwinUMamba(VSSEncoder):
    """Swin-UMamba (arXiv 2402.03302), for images of any size from 32 px up.

    Args:
        in_chans: Input channels.
        num_classes: Classes, including the background.
        dims: Channels of the encoder's stages.
        depths: Blocks of each stage.
        deep_supervision: In training, return the logits at strides 1, 2, 4 and 8.
        drop_path_rate: Stochastic depth, rising linearly over the encoder's blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 2,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 9, 2),
        deep_supervision: bool = False,
        drop_path_rate: float = 0.2,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(in_chans, num_classes, (32, 32), deep_supervision)
        first = dims[0] // 2
        self.set_features(dims, [4 * 2**i for i in range(len(dims))], first)
        norm = nn.InstanceNorm2d(first, affine=True, **dd)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, first, 7, 2, padding=3, **dd), norm)
        self.embed = PatchEmbed(None, 2, first, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        self.stages = self.make_stages(dims, depths, drop_path_rate, **dd)
        # At strides 1, 2, 4 ...: the input channels, and the width of the skip.
        enter, widths = (in_chans, first, *dims[:-1]), (first, *dims)
        self.skips = nn.ModuleList(ResBlock(2, a, b, **dd) for a, b in zip(enter, widths, strict=True))
        self.widths = widths
        deeper = (*widths[1:], dims[-1])  # the deepest skip is as wide as the map below it
        self.decoder = nn.ModuleList(UpBlock(2, a, b, **dd) for a, b in zip(deeper, widths, strict=True))
        self.last = ResBlock(2, first, first, **dd)
        self.heads = self.make_heads(self.head_dims(), **dd)
        self.init_weights(needs_reset=False)

    def head_dims(self) -> list[int]:
        """Channels of the maps from `decode`."""
        return list(self.widths[:4])

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images, sides multiples of 32, to the outputs of the encoder's stages."""
        return self.run_stages(self.embed(self.stem(x)))

    def decode(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Input and outputs of `encode` to the decoder's maps at strides 1, 2, 4 and 8."""
        inputs = [x, self.stem(x), *outputs[:-1]]
        maps = [outputs[-1]]
        for level in reversed(range(len(inputs))):
            maps.insert(0, self.decoder[level](maps[0], self.skips[level](inputs[level])))
        return [self.last(maps[0]), *maps[1:4]]


class SwinUMambaD(VSSEncoder):
    """Swin-UMamba-D (arXiv 2402.03302), for images of any size from 32 px up.

    Args:
        in_chans, num_classes, dims, depths, drop_path_rate: As in `SwinUMamba`.
        depth_decoder: Blocks of each decoder level.
        deep_supervision: In training, return the logits at strides 1, 4, 8 and 16.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 2,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 9, 2),
        depth_decoder: int = 2,
        deep_supervision: bool = False,
        drop_path_rate: float = 0.2,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(in_chans, num_classes, (32, 32), deep_supervision)
        self.set_features(dims, [4 * 2**i for i in range(len(dims))], dims[0])
        self.dims = dims
        self.embed = PatchEmbed(None, 4, in_chans, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        self.stages = self.make_stages(dims, depths, drop_path_rate, **dd)
        # From the deepest level up.
        pairs = list(zip(dims[:0:-1], dims[-2::-1], strict=True))
        self.expands = nn.ModuleList(PatchExpand(a, b, 2, **dd) for a, b in pairs)
        self.reduces = nn.ModuleList(nn.Linear(2 * b, b, **dd) for _, b in pairs)
        self.decoder = nn.ModuleList(Stage([VSSBlock(b, Mixer, **dd) for _ in range(depth_decoder)]) for _, b in pairs)
        self.final_up = PatchExpand(dims[0], dims[0], 4, **dd)
        self.heads = self.make_heads(self.head_dims(), **dd)
        self.init_weights(needs_reset=False)

    def head_dims(self) -> list[int]:
        """Channels of the maps from `decode`."""
        return [self.num_features, *self.dims[:-1]]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images, sides multiples of 32, to the outputs of the encoder's stages."""
        return self.run_stages(self.embed(x))

    def decode(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Input and outputs of `encode` to the decoder's maps at strides 1, 4, 8 and 16."""
        skips = [y.permute(0, 2, 3, 1) for y in outputs]
        y, maps = skips[-1], []
        levels = zip(self.expands, self.reduces, self.decoder, reversed(skips[:-1]), strict=True)
        for expand, reduce, stage, skip in levels:
            maps.insert(0, y := stage(reduce(torch.cat([expand(y), skip], -1))))
        return [to_nchw(m) for m in (self.final_up(y), *maps)]


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^(?:module|_orig_mod)\.", ""),
    (r"^vssm_encoder\.patch_embed\.", "embed."),
    (r"^vssm_encoder\.layers\.", "stages."),
    (r"^vssm_encoder\.downsamples\.(\d+)\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    *SS2D_NAMES,
    (r"\.(conv\d|transp_conv|conv)\.conv\.(weight|bias)$", r".\1.\2"),  # monai's wrappers
    (r"^encoder(\d)\.layer\.", lambda m: f"skips.{int(m[1]) - 1}."),
    (r"^decoder1\.layer\.", "last."),
    (r"^decoder(\d)\.transp_conv\.", lambda m: f"decoder.{int(m[1]) - 2}.up."),
    (r"^decoder(\d)\.conv_block\.", lambda m: f"decoder.{int(m[1]) - 2}.block."),
    (r"^out_layers\.(\d)\.(?:conv\.)?", r"heads.\1."),
    (r"^decoder\.expand_layers\.3\.", "final_up."),
    (r"^decoder\.expand_layers\.", "expands."),
    (r"^decoder\.concat_back_dim\.", "reduces."),
    (r"^decoder\.stages\.", "decoder."),
    (r"^decoder\.seg_layers\.(\d)\.", lambda m: f"heads.{3 - int(m[1])}."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts the published state dict, also from nnU-Net's checkpoints, to ours."""
    state_dict = unwrap_nnunet(state_dict)
    if "embed.proj.weight" in state_dict:
        return heads_of_other_classes(state_dict, model)
    renamed = {rename(key, _RENAMES): value for key, value in state_dict.items()}
    return heads_of_other_classes(reshape_as(renamed, model), model)


def _cfg(**kwargs):
    return {
        "num_classes": 2,
        "input_size": (3, 256, 256),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "license": "apache-2.0",
        "origin_url": "https://github.com/JiarunLiu/Swin-UMamba",
        "paper_ids": "arXiv:2402.03302",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {"swin_umamba": _cfg(first_conv="stem.0"), "swin_umamba_d": _cfg(first_conv="embed.proj")}
)


def _create(kind, variant, pretrained=False, **kwargs):
    return build_model_with_cfg(kind, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def swin_umamba(pretrained: bool = False, **kwargs) -> SwinUMamba:
    """Swin-UMamba."""
    return _create(SwinUMamba, "swin_umamba", pretrained, **kwargs)


@register_model
def swin_umamba_d(pretrained: bool = False, **kwargs) -> SwinUMambaD:
    """Swin-UMamba-D."""
    return _create(SwinUMambaD, "swin_umamba_d", pretrained, **kwargs)
