"""SegMamba.

Paper: SegMamba: Long-range Sequential Modeling Mamba for 3D Medical Image Segmentation (MICCAI 2024)
- https://arxiv.org/abs/2401.13560

A segmenter of volumes with four encoder stages at strides 2 to 16. Each has a gated convolution (GSC) and two Mamba
layers, whose mixer scans the voxels forwards, backwards and through the slices. The convolutional decoder is like
UNETR's.

Maps are channel-first (B, C, D, H, W).
"""

import re

import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn, stack

from linzoo.ops import scan_order

from .layers.checkpoint import MAMBA_NAMES, rename, reshape_as
from .layers.dense import DenseModel, ResBlock, UpBlock, heads_of_other_classes, unwrap_nnunet
from .layers.mamba import MambaMixer

__all__ = ["SegMamba"]


class GSC(nn.Module):
    """Gated spatial convolution (section 2.2).

    ``a = f(conv3(f(conv3 x)));  b = f(conv1 x);  x + f(conv1(a + b))``, f an instance norm without parameters and ReLU.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Conv3d(dim, dim, 3, padding=1, **dd)
        self.proj2 = nn.Conv3d(dim, dim, 3, padding=1, **dd)
        self.proj3 = nn.Conv3d(dim, dim, 1, **dd)
        self.proj4 = nn.Conv3d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        def norm_act(y: Tensor) -> Tensor:
            return F.relu(F.instance_norm(y))

        a = norm_act(self.proj2(norm_act(self.proj(x))))
        return x + norm_act(self.proj4(a + norm_act(self.proj3(x))))


class MambaBlock(nn.Module):
    """``x += Mamba(LN(x))`` on tokens ``(B, L, C)`` along orders ``(3, L)``."""

    def __init__(self, dim: int, d_state: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mamba = MambaMixer(dim, directions=3, d_state=d_state, **dd)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        return x + self.mamba(self.norm(x), order)


@register_notrace_module  # FX cannot trace scan orders, which depend on the size of the volume
class VolumeStage(nn.Module):
    """Downsampling, GSC and Mamba layers on a map ``(B, C, D, H, W)``; the layers support gradient checkpointing.

    Args:
        downsample: Module before the rest.
        dim: Channels after it.
        depth: Mamba layers.
        chunks: Runs of tokens in the third scan, see `linzoo.ops.scan_order.slices`.
        d_state: States per channel.
    """

    def __init__(self, downsample: nn.Module, dim: int, depth: int, chunks: int, d_state: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.chunks = chunks
        self.downsample = downsample
        self.gsc = GSC(dim, **dd)
        self.blocks = nn.ModuleList(MambaBlock(dim, d_state, **dd) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.gsc(self.downsample(x))
        size, tokens = x.shape[2:], x.flatten(2).transpose(1, 2)
        if tokens.shape[1] % self.chunks:
            raise ValueError(
                f"x: a stage's map of {tuple(size)} has {tokens.shape[1]} voxels; expected a multiple of its "
                f"{self.chunks} slices (sides that are multiples of 32 always are)"
            )
        order = scan_order.volume(tokens.shape[1], self.chunks, x.device)
        for block in self.blocks:
            tokens = checkpoint(block, tokens, order) if self.grad_checkpointing else block(tokens, order)
        return tokens.transpose(1, 2).unflatten(2, size)


class Mlp(nn.Sequential):
    """``W_2 GELU(W_1 IN(x))`` of a map ``(B, C, D, H, W)``, with twice the width inside."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        conv1, conv2 = nn.Conv3d(dim, 2 * dim, 1, **dd), nn.Conv3d(2 * dim, dim, 1, **dd)
        super().__init__(nn.InstanceNorm3d(dim), conv1, nn.GELU(), conv2)


class SegMamba(DenseModel):
    """SegMamba (arXiv 2401.13560), for volumes whose sides are multiples of 32, and some others.

    Args:
        in_chans: Input channels.
        num_classes: Classes, including the background.
        dims: Channels of the encoder's stages.
        dim_bottom: Channels below them.
        depths: Mamba layers of each stage.
        chunks: For each stage, the runs of tokens in its third scan: the depths of its maps for a volume of 128 slices,
            whatever the actual volume.
        d_state: States per channel.
    """

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 2,
        dims: tuple[int, ...] = (48, 96, 192, 384),
        dim_bottom: int = 768,
        depths: tuple[int, ...] = (2, 2, 2, 2),
        chunks: tuple[int, ...] = (64, 32, 16, 8),
        d_state: int = 16,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(in_chans, num_classes, (16, 16, 16), False)
        self.set_features(dims, [2 * 2**i for i in range(len(dims))], dims[0])
        stages = []
        for i, dim in enumerate(dims):
            down = nn.Sequential(nn.InstanceNorm3d(dims[i - 1]), nn.Conv3d(dims[i - 1], dim, 2, 2, **dd))
            down = down if i else nn.Conv3d(in_chans, dim, 7, 2, padding=3, **dd)
            stages.append(VolumeStage(down, dim, depths[i], chunks[i], d_state, **dd))
        self.stages = nn.ModuleList(stages)
        self.mlps = nn.ModuleList(Mlp(dim, **dd) for dim in dims)
        enter, widths = (in_chans, *dims), (*dims, dim_bottom)
        self.skips = nn.ModuleList(ResBlock(3, a, b, **dd) for a, b in zip(enter, widths, strict=True))
        self.decoder = nn.ModuleList(UpBlock(3, a, b, **dd) for a, b in zip(widths[1:], dims, strict=True))
        self.last = ResBlock(3, dims[0], dims[0], **dd)
        self.heads = self.make_heads(self.head_dims(), **dd)
        self.init_weights(needs_reset=False)

    def head_dims(self) -> list[int]:
        """Channels of the one map that `decode` gives."""
        return [self.num_features]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Volumes, sides multiples of 16, to the outputs of the encoder's stages."""
        outputs = []
        for stage in self.stages:
            outputs.append(x := stage(x))
        return outputs

    def decode(self, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Input and outputs of `encode` to the decoder's map at the input's size."""
        inputs = [x, *(mlp(y) for mlp, y in zip(self.mlps, outputs, strict=True))]
        skips = [skip(y) for skip, y in zip(self.skips, inputs, strict=True)]
        y = skips.pop()
        for level in reversed(range(len(skips))):
            y = self.decoder[level](y, skips[level])
        return [self.last(y)]


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^(?:module|_orig_mod)\.", ""),
    (r"\.(conv\d|transp_conv)\.conv\.(weight|bias)$", r".\1.\2"),  # monai's wrappers
    (r"^vit\.downsample_layers\.0\.0\.", "stages.0.downsample."),
    (r"^vit\.downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.1."),
    (r"^vit\.gscs\.(\d)\.", r"stages.\1.gsc."),
    (r"^vit\.mlps\.(\d)\.fc1\.", r"mlps.\1.1."),
    (r"^vit\.mlps\.(\d)\.fc2\.", r"mlps.\1.3."),
    (r"^vit\.stages\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
    (r"^encoder(\d)\.layer\.", lambda m: f"skips.{int(m[1]) - 1}."),
    (r"^decoder1\.layer\.", "last."),
    (r"^decoder(\d)\.transp_conv\.", lambda m: f"decoder.{int(m[1]) - 2}.up."),
    (r"^decoder(\d)\.conv_block\.", lambda m: f"decoder.{int(m[1]) - 2}.block."),
    (r"^out\.conv\.conv\.", "heads.0."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts the published state dict to ours; the parameters of the three directions are stacked."""
    state_dict = unwrap_nnunet(state_dict)
    if "stages.0.gsc.proj.weight" in state_dict:
        return heads_of_other_classes(state_dict, model)
    out, parts = {}, {}
    for key, value in state_dict.items():
        key = rename(key, _RENAMES)
        block, found, leaf = key.partition(".mamba.")
        direction = re.search(r"_([bs])(?=_log$|\.|$)", leaf)
        ours = MAMBA_NAMES.get(re.sub(r"_[bs](?=_log$|\.|$)", "", leaf))
        if found and ours:
            index = "_bs".index(direction[1]) if direction else 0
            parts.setdefault(f"{block}.mamba.{ours}", {})[index] = value
        else:
            out[key] = value
    out |= {key: stack([values[i] for i in sorted(values)]) for key, values in parts.items()}
    return heads_of_other_classes(reshape_as(out, model), model)


default_cfgs = generate_default_cfgs(
    {
        "segmamba": {
            "num_classes": 2,
            "input_size": None,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.0,),
            "std": (1.0,),
            "first_conv": None,
            "origin_url": "https://github.com/ge-xing/SegMamba",
            "paper_ids": "arXiv:2401.13560",
        }
    }
)


@register_model
def segmamba(pretrained: bool = False, **kwargs) -> SegMamba:
    """SegMamba."""
    return build_model_with_cfg(SegMamba, "segmamba", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)
