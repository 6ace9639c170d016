"""Shared parts of the medical segmentation models: convolutional blocks in 2-D and 3-D, and heads at several sizes.

Maps are channel-first, ``(B, C, H, W)`` or ``(B, C, D, H, W)``.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from torch import Tensor, nn

from .checkpoint import unwrap_state_dict
from .padding import zero_pad
from .pyramid import Pyramid
from .script import refuse_script

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class ResBlock(nn.Module):
    """UNETR's residual block: ``LeakyReLU(IN(conv(LeakyReLU(IN(conv x)))) + r)``.

    r is x, or ``IN(conv1x1(x))`` if the number of channels changes. Norms have no parameters, convolutions no bias.

    Args:
        dims: 2 or 3 axes.
        dim, dim_out: Channels.
    """

    def __init__(self, dims: int, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = CONV[dims](dim, dim_out, 3, padding=1, bias=False, **dd)
        self.conv2 = CONV[dims](dim_out, dim_out, 3, padding=1, bias=False, **dd)
        self.conv3 = CONV[dims](dim, dim_out, 1, bias=False, **dd) if dim != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        y = F.instance_norm(self.conv2(y))
        return F.leaky_relu(y + (x if self.conv3 is None else F.instance_norm(self.conv3(x))), 0.01)


class UpBlock(nn.Module):
    """Doubles a map's size by a transposed convolution, concatenates a skip of that size, and applies a `ResBlock`."""

    def __init__(self, dims: int, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.up = TRANSPOSED[dims](dim, dim_out, 2, 2, bias=False, **dd)
        self.block = ResBlock(dims, 2 * dim_out, dim_out, **dd)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.up(x), skip], 1))


@register_notrace_function  # FX cannot trace what depends on the size of the input
def pad_to_strides(x: Tensor, in_chans: int, strides: Sequence[int]) -> Tensor:
    """x, padded with zeros at the end of each axis to multiples of its stride.

    Raises:
        ValueError: x is not ``(B, in_chans, ...)`` with one axis per stride, or a side is shorter than its stride.
    """
    axes = "DHW"[-len(strides) :]
    if x.dim() != 2 + len(strides) or x.shape[1] != in_chans:
        raise ValueError(f"x: expected (B, {in_chans}, {', '.join(axes)}), got {tuple(x.shape)}")
    if any(side < stride for side, stride in zip(x.shape[2:], strides, strict=True)):
        raise ValueError(
            f"x: sides {tuple(x.shape[2:])} are below the model's strides; expected {tuple(strides)} at least"
        )
    pad = [n for side, stride in zip(reversed(x.shape), reversed(strides), strict=False) for n in (0, -side % stride)]
    return zero_pad(x, pad)


def unwrap_nnunet(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint from nnU-Net or another trainer."""
    return checkpoint["network_weights"] if "network_weights" in checkpoint else unwrap_state_dict(checkpoint)


def heads_of_other_classes(state_dict: dict[str, Tensor], model: "DenseModel") -> dict[str, Tensor]:
    """A state dict in our names; heads with another number of classes are replaced by the model's."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith("heads.")}
    anew = {k: v for k, v in own.items() if k in state_dict and len(state_dict[k]) != len(v)}
    if anew:
        warnings.warn(f"heads of another number of classes begin anew: {', '.join(anew)}", stacklevel=2)
    extra = {key for key in state_dict if key.startswith("heads.")} - own.keys()  # a model without classes has none
    return {key: anew.get(key, value) for key, value in state_dict.items() if key not in extra}


class DenseModel(nn.Module):
    """Base of models that classify every pixel or voxel, with heads at several sizes (deep supervision).

    A family's constructor calls `super().__init__` and sets `heads`, 1x1 convolutions of the maps from `decode`, the
    largest first. It defines `encode` and `decode`.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for the features of the last map.
        strides: For each axis, the product of the encoder's strides along it. Their number is the number of axes.
        deep_supervision: In training, return the logits of all heads.
    """

    __prepare_scriptable__ = refuse_script
    heads: nn.ModuleList
    stages: nn.ModuleList

    def __init__(self, in_chans: int, num_classes: int, strides: Sequence[int], deep_supervision: bool):
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.strides, self.deep_supervision = tuple(strides), deep_supervision
        self.grad_checkpointing = False

    def set_features(self, dims: Sequence[int], reductions: Sequence[int], dim_out: int) -> None:
        """Sets channels and strides of the encoder's stages, for timm, and channels of the largest map."""
        self.num_features = self.head_hidden_size = dim_out
        pairs = zip(dims, reductions, strict=True)
        self.feature_info = [dict(num_chs=d, reduction=r, module=f"stages.{i}") for i, (d, r) in enumerate(pairs)]

    def make_heads(self, dims: Sequence[int], **dd) -> nn.ModuleList:
        """A 1x1 convolution for each map, the largest first; identities without classes."""
        conv = CONV[len(self.strides)]
        return nn.ModuleList(conv(d, self.num_classes, 1, **dd) if self.num_classes else nn.Identity() for d in dims)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill.

        Convolutions other than depthwise ones get He's normal distribution for a slope of 0.01, and zeros.
        """
        for module in self.modules():
            Pyramid._init_weights(module, needs_reset)
        for module in self.modules():
            if isinstance(module, (*CONV.values(), *TRANSPOSED.values())) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scans' skips D: matrices here, but vectors in the published recipes."""
        return {name for name, _ in self.named_parameters() if name.endswith(".s6.D")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rate decay: the encoder's stages, then the rest."""
        rest = r"^(?!stem|embed|stages)"
        return dict(stem=r"^(?:stem|embed)", blocks=[(r"^stages\.(\d+)", None), (rest, (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether the encoder's blocks are recomputed in the backward pass."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if module is not self and hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head of the largest map."""
        return self.heads[0]

    def reset_classifier(self, num_classes: int, **dd) -> None:
        """Replaces all heads; 0 removes them."""
        self.num_classes = num_classes
        widths = self.head_dims()
        self.heads = self.make_heads(widths, **(dd or get_device_dtype(self))).train(self.training)

    def head_dims(self) -> list[int]:
        """Channels of the maps from `decode`."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images or volumes (sides are multiples of `strides`) to the outputs of the encoder's stages."""
        raise NotImplementedError

    def decode(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Input and outputs of `encode` to the decoder's maps, the largest first."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or volumes to the largest map of the decoder; sides are padded to multiples of `strides`."""
        x = pad_to_strides(x, self.in_chans, self.strides)
        return self.decode(x, self.encode(x))[0]

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs of the encoder's stages, channel-first.

        Args:
            x: As in `forward`.
            indices: The last n stages if int, all if None, else those listed.
            intermediates_only: Return only the maps.

        Returns:
            The output of `forward_features` and the list of maps; or only that list.
        """
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        x = pad_to_strides(x, self.in_chans, self.strides)
        outputs = self.encode(x)
        maps = [outputs[i].contiguous() for i in take_indices]
        return maps if intermediates_only else (self.decode(x, outputs)[0], maps)

    def forward_deep(self, x: Tensor) -> list[Tensor]:
        """The logits of all heads, the largest map first; see `forward`."""
        padded = pad_to_strides(x, self.in_chans, self.strides)
        maps = self.decode(padded, self.encode(padded))
        return [self._crop(head(y), x, padded) for head, y in zip(self.heads, maps, strict=True)]

    @staticmethod
    def _crop(y: Tensor, x: Tensor, padded: Tensor) -> Tensor:
        """Crops a map y of the padded input to the part that shows the input x."""
        for axis in range(2, x.dim()):
            shown, whole = x.shape[axis] * y.shape[axis], padded.shape[axis]
            y = y.narrow(axis, 0, (shown + whole - 1) // whole)
        return y

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images or volumes ``(B, in_chans, ...)`` to logits ``(B, num_classes, ...)`` of their size.

        Sides that are not multiples of `strides` are padded with zeros, and the logits cropped. In training with
        `deep_supervision` the result is a list: the logits of all heads, the largest map first (as `forward_deep`
        always returns).

        Raises:
            ValueError: the number of channels or axes is wrong; a side is below its stride.
        """
        if self.training and self.deep_supervision:
            return self.forward_deep(x)
        padded = pad_to_strides(x, self.in_chans, self.strides)
        return self._crop(self.heads[0](self.decode(padded, self.encode(padded))[0]), x, padded)
