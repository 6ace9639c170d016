"""U-Mamba.

Paper: U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation - https://arxiv.org/abs/2401.04722

nnU-Net's residual U-Net with Mamba layers: Bot has one at the bottleneck, Enc one after the encoder's stages. It is a
family of networks: nnU-Net plans patch size, widths, strides and kernels for each data set. These are arguments here.
This file has the network and its 2-D variants; `umamba_3d.py` has the variants for volumes.

Maps are channel-first.
"""

import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .layers.checkpoint import MAMBA_NAMES, rename, reshape_as
from .layers.dense import CONV, INSTANCE_NORM, DenseModel, heads_of_other_classes, unwrap_nnunet
from .layers.mamba import MambaMixer

__all__ = ["UMamba"]

Size = Sequence[int]


class ResidualBlock(nn.Module):
    """``act(norm(conv(act(norm(conv x)))) + r)``: r is x, or with `project` a strided 1x1 convolution of x.

    Norms are instance norms with parameters, activations are LeakyReLU 0.01, and convolutions have biases.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        kernel: Size,
        stride: Size | int = 1,
        project: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        conv, norm, pad = CONV[len(kernel)], INSTANCE_NORM[len(kernel)], tuple(k // 2 for k in kernel)
        kernel = tuple(kernel)
        self.conv1 = conv(dim, dim_out, kernel, stride, padding=pad, **dd)
        self.norm1 = norm(dim_out, affine=True, **dd)
        self.conv2 = conv(dim_out, dim_out, kernel, padding=pad, **dd)
        self.norm2 = norm(dim_out, affine=True, **dd)
        self.conv3 = conv(dim, dim_out, 1, stride, **dd) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = self.norm2(self.conv2(y))
        return F.leaky_relu(y + (x if self.conv3 is None else self.conv3(x)), 0.01)


def blocks(dim: int, dim_out: int, kernel: Size, stride: Size | int, depth: int, **dd) -> nn.Sequential:
    """A block that changes width and size, then ``depth - 1`` that do not."""
    first = ResidualBlock(dim, dim_out, kernel, stride, project=True, **dd)
    return nn.Sequential(first, *(ResidualBlock(dim_out, dim_out, kernel, **dd) for _ in range(depth - 1)))


@register_notrace_module  # FX cannot trace what depends on the size of the map
class MambaLayer(nn.Module):
    """``Mamba(LN(tokens))`` of a map ``(B, C, ...)``, **without a residual connection**, in the weights' precision.

    Tokens are the positions in raster order. With `positions` they are the channels instead, each a vector of all
    positions; the map must then have exactly that many.
    """

    def __init__(self, dim: int, positions: int | None = None, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.positions = positions
        self.norm = nn.LayerNorm(positions or dim, eps=1e-5, **dd)
        self.mamba = MambaMixer(positions or dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens, size = x.flatten(2), x.shape[2:]
        if self.positions is None:
            tokens = tokens.transpose(1, 2)
        elif tokens.shape[2] != self.positions:
            raise ValueError(
                f"x: a map of {tuple(size)} is not of {self.positions} positions; this layer's tokens are channels, so "
                "the model takes nothing but its patch_size"
            )
        # Autocast does not support the meta device.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            tokens = self.mamba(self.norm(tokens.to(self.norm.weight.dtype)))
        return (tokens if self.positions else tokens.transpose(1, 2)).unflatten(2, size)


class EncoderStage(nn.Module):
    """Convolutional blocks, then a Mamba layer or none; the blocks use gradient checkpointing if enabled."""

    def __init__(self, blocks: nn.Module, mamba: nn.Module):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks, self.mamba = blocks, mamba

    def forward(self, x: Tensor) -> Tensor:
        return self.mamba(checkpoint(self.blocks, x) if self.grad_checkpointing else self.blocks(x))


class UMamba(DenseModel):
    """U-Mamba (arXiv 2401.04722) for an nnU-Net plan with 2 or 3 axes.

    Args:
        in_chans: Input channels.
        num_classes: Classes, including the background.
        patch_size: Size of the patches ``(H, W)`` or ``(D, H, W)``. With `mamba` "enc", a stage uses channels as tokens
            if its patch has no more positions than channels; such a model takes no other size.
        features: Channels of each stage.
        strides: For each stage except the first, its stride on each axis, or one for all axes.
        kernel_sizes: For every stage, its kernel size on each axis, or one for all axes; one number for all stages.
        depth: Blocks of a stage; stages of the second half have one, as in the authors' code.
        mamba: "bot" for one layer after the last stage, "enc" for one after every stage (3-D) or every second one,
            including the last (2-D).
        deep_supervision: In training, return the logits of every decoder level.

    Raises:
        ValueError: parts of the plan do not fit each other, or unknown `mamba`.
    """

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 2,
        patch_size: Size = (256, 256),
        features: Size = (32, 64, 128, 256, 512, 512, 512),
        strides: Sequence[int | Size] = (2, 2, 2, 2, 2, 2),
        kernel_sizes: int | Sequence[int | Size] = 3,
        depth: int = 2,
        mamba: Literal["bot", "enc"] = "bot",
        deep_supervision: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        axes, count = len(patch_size), len(features)

        def on_axes(size: int | Size) -> tuple[int, ...]:
            return (size,) * axes if isinstance(size, int) else tuple(size)

        plan = [on_axes(1), *map(on_axes, strides)]
        kernels = [on_axes(k) for k in ([kernel_sizes] * count if isinstance(kernel_sizes, int) else kernel_sizes)]
        if axes not in CONV or mamba not in ("bot", "enc"):
            raise ValueError(f"patch_size={patch_size!r}, mamba={mamba!r}: expected 2 or 3 axes, and 'bot' or 'enc'")
        if len(plan) != count or len(kernels) != count or any(len(s) != axes for s in (*plan, *kernels)):
            raise ValueError(
                f"strides={strides!r}, kernel_sizes={kernel_sizes!r}: expected {count - 1} strides and {count} kernels "
                f"of {axes} axes, for features={features!r}"
            )
        total = tuple(math.prod(s) for s in zip(*plan, strict=True))
        if any(side % stride for side, stride in zip(patch_size, total, strict=True)):
            raise ValueError(f"patch_size={patch_size!r}: expected multiples of the strides' product {total}")
        super().__init__(in_chans, num_classes, total, deep_supervision)
        self.patch_size, self.plan = tuple(patch_size), plan
        depths = [depth if s < math.ceil(count / 2) else 1 for s in range(count)]
        self.stem = blocks(in_chans, features[0], kernels[0], 1, depths[0], **dd)
        stages, size, reduction, reductions = [], self.patch_size, 1, []
        for s, dim in enumerate(features):
            size = tuple(n // stride for n, stride in zip(size, plan[s], strict=True))
            reduction *= max(plan[s])
            reductions.append(reduction)
            mixer: nn.Module = nn.Identity()
            if mamba == "enc" and (axes == 3 or s % 2 != count % 2):
                mixer = MambaLayer(dim, math.prod(size) if math.prod(size) <= dim else None, **dd)
            enter = features[max(s - 1, 0)]
            stages.append(EncoderStage(blocks(enter, dim, kernels[s], plan[s], depths[s], **dd), mixer))
        self.stages = nn.ModuleList(stages)
        self.set_features(features, reductions, features[0])
        self.bottleneck = MambaLayer(features[-1], **dd) if mamba == "bot" else nn.Identity()
        # From the deepest level up; in 2-D the last level does not use its skip.
        self.dims = tuple(features[-2::-1])
        self.reduces = nn.ModuleList(CONV[axes](a, b, 1, **dd) for a, b in zip(features[:0:-1], self.dims, strict=True))
        self.decoder = nn.ModuleList()
        for i, dim in enumerate(self.dims):
            enter = dim if axes == 2 and i == count - 2 else 2 * dim
            blocks_here = 1 if i >= math.ceil((count - 1) / 2 + 0.5) else depth
            self.decoder.append(blocks(enter, dim, kernels[count - 2 - i], 1, blocks_here, **dd))
        self.heads = self.make_heads(self.head_dims(), **dd)
        self.init_weights(needs_reset=False)

    @staticmethod
    def _keep(module: nn.Module) -> None:
        """The Mamba layers are initialised as in Mamba: PyTorch's linear maps."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        super().init_weights(needs_reset)
        self._keep(self)

    def head_dims(self) -> list[int]:
        """Channels of the maps from `decode`."""
        return list(reversed(self.dims))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images or volumes, sides multiples of `strides`, to the outputs of the encoder's stages."""
        x, outputs = self.stem(x), []
        for stage in self.stages:
            outputs.append(x := stage(x))
        return outputs

    def decode(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Input and outputs of `encode` to the maps of all decoder levels, the largest first."""
        y, maps = self.bottleneck(outputs[-1]), []
        for i, (reduce, level) in enumerate(zip(self.reduces, self.decoder, strict=True)):
            scale = tuple(float(s) for s in self.plan[len(outputs) - 1 - i])
            y = reduce(F.interpolate(y, scale_factor=scale, mode="nearest"))
            if level[0].conv1.in_channels > y.shape[1]:
                y = torch.cat([y, outputs[-2 - i]], 1)
            maps.insert(0, y := level(y))
        return maps


# Published names and ours, in the order in which they are replaced; the order of the heads is then reversed.
_RENAMES = [
    (r"^(?:module|_orig_mod)\.", ""),
    (r"\.(conv|norm)(\d)\.(?:conv|norm)\.", r".\1\2."),
    (r"^encoder\.stem\.", "stem."),
    (r"^encoder\.stages\.(\d+)\.", r"stages.\1.blocks."),
    (r"^encoder\.mamba_layers\.(\d+)\.", r"stages.\1.mamba."),
    (r"^mamba_layer\.", "bottleneck."),
    (r"^decoder\.upsample_layers\.(\d+)\.conv\.", r"reduces.\1."),
    (r"^decoder\.stages\.", "decoder."),
    *((rf"\.mamba\.{re.escape(theirs)}$", f".mamba.{ours}") for theirs, ours in MAMBA_NAMES.items()),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: UMamba) -> dict[str, Tensor]:
    """Converts the published state dict or nnU-Net's checkpoint to ours; tensors with two names are taken once."""
    state_dict = unwrap_nnunet(state_dict)
    if not any("encoder.stem." in key for key in state_dict):
        return heads_of_other_classes(state_dict, model)
    out = {}
    for key, value in state_dict.items():
        if key.startswith("decoder.encoder.") or ".all_modules." in key:
            continue
        key = re.sub(r"\.conv(\d)\.(conv|norm)\.", r".\2\1.", key)
        key = rename(key, _RENAMES)
        if head := re.fullmatch(r"decoder\.seg_layers\.(\d+)\.(\w+)", key):
            key = f"heads.{len(model.dims) - 1 - int(head[1])}.{head[2]}"
        out[key] = value
    return heads_of_other_classes(reshape_as(out, model), model)


def plan_cfg(input_size: tuple[int, ...] | None) -> dict:
    """timm's pretrained configuration of the default plan."""
    return {
        "num_classes": 2,
        "input_size": input_size,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": None,
        "license": "apache-2.0",
        "origin_url": "https://github.com/bowang-lab/U-Mamba",
        "paper_ids": "arXiv:2401.04722",
    }


def create_umamba(variant: str, pretrained: bool = False, **kwargs) -> UMamba:
    """`build_model_with_cfg` for every variant."""
    return build_model_with_cfg(UMamba, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


default_cfgs = generate_default_cfgs({name: plan_cfg((1, 256, 256)) for name in ("umamba_bot_2d", "umamba_enc_2d")})


@register_model
def umamba_bot_2d(pretrained: bool = False, **kwargs) -> UMamba:
    """U-Mamba for images, with a Mamba layer at the bottleneck; the default plan is ours."""
    return create_umamba("umamba_bot_2d", pretrained, **dict(dict(mamba="bot"), **kwargs))


@register_model
def umamba_enc_2d(pretrained: bool = False, **kwargs) -> UMamba:
    """U-Mamba for images, with Mamba layers in the encoder; the default plan is ours."""
    return create_umamba("umamba_enc_2d", pretrained, **dict(dict(mamba="enc"), **kwargs))
