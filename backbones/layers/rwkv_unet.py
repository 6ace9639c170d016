"""The U-Net of Restore-RWKV (arXiv 2407.11087), also used by models that build on it.

Maps are NCHW between levels and tokens (B, H * W, C) inside them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import nn

from linzoo.ops import bi_wkv, scan_order

from .omni_shift import OmniShift
from .rwkv import RWKVBlock
from .script import refuse_script


class ReWKV(nn.Module):
    """Spatial mix with recurrent WKV (section 3.2): BiWKV along rows, then on its output along columns.

    ``s = shift(z);  k, v, r = W_k s, W_v s, W_r s;  W_o (sigmoid(r) * BiWKV_1(k, BiWKV_0(k, v)))``.

    Args:
        dim: Channels C.
        shift: Module on maps ``(B, H, W, C)``.
        passes: Passes of BiWKV, alternating rows and columns; each has its own decay and bonus.
    """

    def __init__(self, dim: int, shift: nn.Module, passes: int = 2, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.decay = nn.Parameter(torch.empty(passes, dim, **dd))
        self.bonus = nn.Parameter(torch.empty(passes, dim, **dd))
        self.omni_shift = shift
        self.key = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(dim, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.output = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.decay)
        nn.init.normal_(self.bonus)

    def forward(self, x, grid):
        """Tokens ``(B, H * W, C)`` and their grid ``(H, W)``."""
        s = self.omni_shift(x.unflatten(1, grid)).flatten(1, 2)
        k, v = self.key(s), self.value(s)
        for i, (decay, bonus) in enumerate(zip(self.decay, self.bonus, strict=True)):
            order = scan_order.column(*grid, device=x.device) if i % 2 else None
            v = bi_wkv(k, v, decay, bonus, order=order, divide_by_length=True)
        return self.output(torch.sigmoid(self.receptance(s)) * v)


class OmniChannelMix(nn.Module):
    """``s = shift(z);  sigmoid(W_r s) * W_v relu(W_k s)^2``, with an inner width of 4 C."""

    def __init__(self, dim: int, shift: nn.Module, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.omni_shift = shift
        self.key = nn.Linear(dim, 4 * dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(4 * dim, dim, bias=False, **dd)

    def forward(self, x, grid):
        """Tokens ``(B, H * W, C)`` and their grid ``(H, W)``."""
        s = self.omni_shift(x.unflatten(1, grid)).flatten(1, 2)
        return torch.sigmoid(self.receptance(s)) * self.value(F.relu(self.key(s)).square())


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class Level(nn.Module):
    """Blocks on a map ``(B, C, H, W)``.

    Args:
        dim: Channels C.
        depth: Blocks.
        shift: Class of the mixers' token shifts, called with the number of channels.
    """

    def __init__(self, dim: int, depth: int, shift: Callable[..., nn.Module] = OmniShift, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            RWKVBlock(
                dim,
                ReWKV(dim, shift(dim, **dd), **dd),
                OmniChannelMix(dim, shift(dim, **dd), **dd),
                init_values=1.0,
                **dd,
            )
            for _ in range(depth)
        )

    def forward(self, x):
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x.unflatten(1, grid).permute(0, 3, 1, 2)


class Downsample(nn.Sequential):
    """Half the size, twice the channels: a 3x3 convolution and a pixel unshuffle."""

    def __init__(self, dim: int, device=None, dtype=None):
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False, device=device, dtype=dtype)
        super().__init__(conv, nn.PixelUnshuffle(2))


class Upsample(nn.Sequential):
    """Twice the size, half the channels: a 3x3 convolution and a pixel shuffle."""

    def __init__(self, dim: int, device=None, dtype=None):
        conv = nn.Conv2d(dim, 2 * dim, 3, padding=1, bias=False, device=device, dtype=dtype)
        super().__init__(conv, nn.PixelShuffle(2))


@register_notrace_function  # FX cannot trace what depends on the image's size
def pad_image(x, in_chans, multiple):
    """Repeats the last row and column of images until their sides are multiples; ValueError for other channels."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x: expected (B, {in_chans}, H, W), got {tuple(x.shape)}")
    H, W = x.shape[2:]
    return F.pad(x, (0, -W % multiple, 0, -H % multiple), mode="replicate")


class RWKVUNet(nn.Module):
    """Restore-RWKV's four-level U-Net: takes images, returns restored images of the same size and channels.

    Args:
        in_chans: Channels of the images.
        dim: Channels of the first level; each further level has twice as many.
        depths: Blocks of each level, the deepest last; the same in encoder and decoder.
        refinement: Blocks after the decoder.
        shift: Class of the mixers' token shifts, called with the number of channels.
    """

    __prepare_scriptable__ = refuse_script

    multiple = 8  # sides that are multiples of this need no padding

    def __init__(
        self,
        in_chans: int = 1,
        dim: int = 48,
        depths: tuple[int, ...] = (4, 6, 6, 8),
        refinement: int = 4,
        shift: Callable[..., nn.Module] = OmniShift,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        dims = [dim * 2**i for i in range(len(depths))]
        self.in_chans = self.num_classes = in_chans
        self.num_features = self.head_hidden_size = 2 * dim
        self.feature_info = [dict(num_chs=d, reduction=2**i, module=f"stages.{i}") for i, d in enumerate(dims)]
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.downsamples = nn.ModuleList(Downsample(d, **dd) for d in dims[:-1])
        self.stages = nn.ModuleList(Level(d, n, shift, **dd) for d, n in zip(dims, depths, strict=True))
        # From the deepest up; at full size nothing reduces the concatenated channels.
        self.upsamples = nn.ModuleList(Upsample(d, **dd) for d in dims[:0:-1])
        self.reduces = nn.ModuleList(nn.Conv2d(2 * d, d, 1, **dd) for d in dims[-2:0:-1])
        widths = [*dims[-2:0:-1], 2 * dim]
        self.decoder = nn.ModuleList(Level(d, n, shift, **dd) for d, n in zip(widths, depths[-2::-1], strict=True))
        self.refinement = Level(2 * dim, refinement, shift, **dd)
        self.head = nn.Conv2d(2 * dim, in_chans, 3, padding=1, **dd)

    def init_weights(self, needs_reset=True):
        """With `needs_reset` (after `to_empty`), fills the parameters as their modules do."""
        for module in self.modules() if needs_reset else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self):
        """The decays and bonuses of the WKV."""
        return {name for name, _ in self.named_parameters() if name.endswith((".decay", ".bonus"))}

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^(?:stages|downsamples)\.(\d+)", None),
                (r"^(?:decoder|upsamples|reduces)\.(\d+)", (9999,)),
                (r"^refinement", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        for level in [*self.stages, *self.decoder, self.refinement]:
            level.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self):
        return self.head

    def encode(self, x):
        """Images (sides are multiples of 8) to the outputs of the encoder's levels ``(B, C_i, H / 2^i, W / 2^i)``."""
        outputs = []
        x = self.stem(x)
        for i, level in enumerate(self.stages):
            x = level(self.downsamples[i - 1](x) if i else x)
            outputs.append(x)
        return outputs

    def skip(self, x, level):
        """What the decoder receives from the encoder's output x of a level."""
        return x

    def decode(self, outputs):
        """The encoder's outputs to the decoder's map ``(B, 2 C, H, W)``."""
        x = outputs[-1]
        for j, level in enumerate(self.decoder):
            i = len(outputs) - 2 - j
            x = torch.cat([self.upsamples[j](x), self.skip(outputs[i], i)], 1)
            x = level(self.reduces[j](x) if i else x)
        return self.refinement(x)

    def forward_features(self, x):
        """Images (sides are multiples of 8) to the map that the head reads ``(B, 2 C, H, W)``."""
        return self.decode(self.encode(x))

    def forward_intermediates(self, x, indices=None, intermediates_only=False):
        """The outputs of the encoder's levels, NCHW.

        Args:
            x: Images ``(B, in_chans, H, W)``, sides multiples of 8.
            indices: The last n levels if int, all if None, else those listed.
            intermediates_only: Return only the maps.

        Returns:
            The output of `forward_features` and the list of maps; or only that list.
        """
        take_indices, _ = feature_take_indices(len(self.stages), indices)
        outputs = self.encode(x)
        maps = [outputs[i].contiguous() for i in take_indices]
        return maps if intermediates_only else (self.decode(outputs), maps)

    def forward(self, x):
        """Images ``(B, in_chans, H, W)`` of any size to restored ones; the network predicts the difference.

        If sides are not multiples of 8, the last row and column are repeated, and the output is cropped.

        Raises:
            ValueError: the number of channels is wrong.
        """
        padded = pad_image(x, self.in_chans, self.multiple)
        H, W = x.shape[2:]
        return x + self.head(self.forward_features(padded))[..., :H, :W]
