"""VM-UNet and MHS-VM.

Papers: VM-UNet: Vision Mamba UNet for Medical Image Segmentation - https://arxiv.org/abs/2402.02491
MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba - https://arxiv.org/abs/2406.05992

A U-Net of VMamba blocks without MLP: four encoder levels, a mirrored decoder, skips that are added. VM-UNet mixes
tokens with SS2D of VMamba's first version; MHS-VM with a multi-head scan, whose heads walk the map along geometric
patterns.

Maps are channel-last (B, H, W, C) inside; input and output are NCHW.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, calculate_drop_path_rates, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import nn

from linzoo.ops import scan_order

from .layers import S6, SS2D, Conv2dNHWC, Pyramid, Stage
from .layers.checkpoint import SS2D_NAMES, rename, reshape_as, unwrap_state_dict
from .layers.script import refuse_script
from .layers.vss import PatchExpand, VSSBlock

__all__ = ["VMUNet"]


def _both_ways(*orders):
    """``[P0, P0 reversed, P1, P1 reversed]``."""
    return torch.stack([route for order in orders for route in (order, scan_order.reverse(order))])


def head_routes(H, W, device=None):
    """The four routes of each head of the multi-head scan, in the heads' order (MHS-VM, section 3): ``{name: (4, L)}``.

    C walks rows and columns to and fro. X walks the anti-diagonals from the upper left and the upper right. S spirals
    inwards from the upper left and the lower left. Z goes row by row and column by column.
    """
    token = scan_order.raster(H, W, device).view(H, W)
    mirrored, upside_down, transposed = token.flip(1).flatten(), token.flip(0).flatten(), token.t().flatten()
    zigzag, spiral = scan_order.zigzag(H, W, device).long(), scan_order.spiral(H, W, device).long()
    return {
        "C": _both_ways(scan_order.snake(H, W, device), transposed[scan_order.snake(W, H, device).long()]),
        "X": _both_ways(zigzag.int(), mirrored[zigzag]),
        "S": _both_ways(spiral.int(), upside_down[spiral]),
        "Z": _both_ways(token.flatten(), transposed),
    }


def scan_route_attention(y, threshold):
    """Merges the four routes' outputs (MHS-VM, section 3.3): their sum, weighted by how much they differ.

    ``relu(cv - threshold) * sum_k y_k`` with ``cv = std_k(y) / (mean_k(y - min y) + 1e-5)``.

    Args:
        y: ``(B, L, 4, C)``.
        threshold: Number; below 2/3 it only shifts the weight, from 2 on nothing passes.

    Returns:
        ``(B, L, C)``.
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    variation = y.std(2) / ((y - y.amin(2, keepdim=True)).mean(2) + 1e-5)
    return y.sum(2) * F.relu(variation - threshold)


@register_notrace_function  # FX cannot trace what depends on the image's size
def with_channels(x, channels):
    """Images ``(B, C, H, W)`` with `channels` channels; a single channel is repeated."""
    if x.shape[1] not in (1, channels):
        raise ValueError(f"x: expected {channels} channels (or 1), got {x.shape[1]}")
    return x.expand(-1, channels, -1, -1)


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class MultiHeadScan(nn.Module):
    """Multi-head scan: subspaces of ``dim // heads`` channels, each walked along the four routes of one pattern.

    ``proj(LN([route attention of head 1 | ... | of head h]))``, ``(B, H, W, C)`` to the same.
    """

    def __init__(self, dim: int, heads: int, gfu_t: float, d_state: int = 16, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        width = dim // heads
        self.gfu_t = gfu_t
        self.in_proj = nn.Linear(dim, heads * width, bias=False, **dd)
        self.heads = nn.ModuleDict({name: S6(width, 4, d_state, **dd) for name in "CXSZ"[:heads]})
        self.norm = nn.LayerNorm(heads * width, eps=1e-5, **dd)
        self.proj = nn.Linear(heads * width, dim, bias=False, **dd)

    def forward(self, x):
        H, W = x.shape[1:3]
        routes = head_routes(H, W, x.device)
        parts = self.in_proj(x).flatten(1, 2).chunk(len(self.heads), dim=-1)
        merged = [
            scan_route_attention(s6(part, routes[name]), self.gfu_t)
            for (name, s6), part in zip(self.heads.items(), parts, strict=True)
        ]
        y = self.norm(torch.cat(merged, -1).to(self.norm.weight.dtype))
        return self.proj(y).unflatten(1, (H, W))


class MultiHeadScanMixer(nn.Module):
    """``LN(MHS(SiLU(DWConv(x)))) * SiLU(z)`` with ``[x, z] = W_in u``: no expansion, no output projection."""

    def __init__(self, dim: int, heads: int, gfu_t: float, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.conv = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.mhs = MultiHeadScan(dim, heads, gfu_t, **dd)
        self.out_norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, u):
        x, z = self.in_proj(u).chunk(2, dim=-1)
        return self.out_norm(self.mhs(F.silu(self.conv(x)))) * F.silu(z)


class VMUNet(nn.Module):
    """VM-UNet (arXiv 2402.02491), or MHS-VM (arXiv 2406.05992) with `num_heads`.

    Args:
        in_chans: Input channels; one-channel images are repeated if 3 are expected.
        num_classes: Channels of the output; 0 for the decoder's own.
        img_size: Ignored, because routes are made for each image's size. The published constructor needs it.
        dims: Channels of each level.
        depths: Blocks of each encoder level.
        depths_decoder: Blocks of each decoder level, from the deepest.
        num_heads: Heads of the multi-head scan, 3 (C, X, S) or 4 (and Z); None for SS2D.
        gfu_t: Threshold of the scan route attention.
        drop_path_rate: Stochastic depth, rising linearly over the encoder's blocks and falling over the decoder's.

    Raises:
        ValueError: the number of heads is not supported.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        img_size: int | tuple[int, int] | None = None,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        depths_decoder: tuple[int, ...] = (2, 2, 2, 1),
        num_heads: int | None = None,
        gfu_t: float = 0.5,
        drop_path_rate: float = 0.2,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if num_heads not in (None, 3, 4):
            raise ValueError(f"num_heads: expected 3, 4, or None for SS2D, got {num_heads!r}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.feature_info = [dict(num_chs=d, reduction=4 * 2**i, module=f"stages.{i}") for i, d in enumerate(dims)]
        self.num_features = self.head_hidden_size = dims[0] // 4
        if num_heads is None:
            mixer = partial(SS2D, ratio=2.0, d_state=16, gated=True)
        else:
            mixer = partial(MultiHeadScanMixer, heads=num_heads, gfu_t=gfu_t)

        self.stem = PatchEmbed(None, 4, in_chans, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [VSSBlock(dim, mixer, rate, **dd) for rate in rates[i]]
            self.stages.append(Stage(blocks, PatchMerging(dims[i - 1], dim, **dd) if i else None))
        rates = calculate_drop_path_rates(drop_path_rate, depths_decoder[::-1], stagewise=True)
        self.decoder = nn.ModuleList()
        for j, dim in enumerate(reversed(dims)):
            blocks = [VSSBlock(dim, mixer, rate, **dd) for rate in reversed(rates[-1 - j])]
            self.decoder.append(Stage(blocks, PatchExpand(2 * dim, dim, 2, **dd) if j else None))
        self.final_up = PatchExpand(dims[0], self.num_features, 4, **dd)
        self.reset_classifier(num_classes, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset=True):
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        self.apply(partial(Pyramid._init_weights, needs_reset=needs_reset))

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)\.(?:downsample|blocks\.(\d+))", None),
                (r"^decoder\.(\d+)", (9999,)),
                (r"^final_up", (99999,)),
            ],
        )

    @torch.jit.ignore
    def no_weight_decay(self):
        """The skips D: matrices here, but vectors in the published recipe."""
        return {name for name, _ in self.named_parameters() if name.endswith(".D")}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        for stage in [*self.stages, *self.decoder]:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes, **dd):
        """Replaces the last convolution; 0 removes it."""
        self.num_classes = num_classes
        head = nn.Conv2d(self.num_features, num_classes, 1, **(dd or get_device_dtype(self))) if num_classes else None
        self.head = nn.Identity() if head is None else head.train(self.training)

    def init_from_classifier(self, state_dict):
        """Starts from a classifier, VMamba of the first version, as VM-UNet does.

        The encoder takes the tensors with its names. The blocks of decoder level 3 - i take those of encoder level i.
        Blocks that only one side has, and everything between decoder levels and after them, stay unchanged.

        Args:
            state_dict: The result of `timm.create_model("vmamba_s_v0").state_dict()`.

        Raises:
            ValueError: a tensor of the encoder is absent or has another shape.
        """
        own, start = self.state_dict(), {}
        for key, value in state_dict.items():
            key = key.replace(".norm1.", ".norm.")
            start[key] = value
            if block := re.fullmatch(r"stages\.(\d+)\.(blocks\..*)", key):
                start[f"decoder.{len(self.decoder) - 1 - int(block[1])}.{block[2]}"] = value
        for key in own:
            if key.startswith(("stem.", "stages.")) and (key not in start or start[key].shape != own[key].shape):
                got = tuple(start[key].shape) if key in start else "none"
                raise ValueError(f"state_dict: expected {key!r} of shape {tuple(own[key].shape)}, got {got}")
        self.load_state_dict({key: value for key, value in start.items() if key in own}, strict=False)

    def encode(self, x):
        """Images, sides multiples of 32, to the encoder levels' inputs and outputs, two lists of ``(B, H, W, C)``."""
        x = self.stem(x)
        inputs, outputs = [], []
        for stage in self.stages:
            inputs.append(stage.downsample(x))
            outputs.append(x := stage.run_blocks(inputs[-1]))
        return inputs, outputs

    def decode(self, inputs, x):
        """The decoder on the deepest output x; level j adds the input of encoder level 4 - j before it expands."""
        for j, stage in enumerate(self.decoder):
            x = stage(x + inputs[-j] if j else x)
        return self.final_up(x)

    def forward_features(self, x):
        """Images ``(B, 3, H, W)``, sides multiples of 32, to the decoder's output ``(B, H, W, C)``."""
        inputs, outputs = self.encode(x)
        return self.decode(inputs, outputs[-1])

    def forward_intermediates(self, x, indices=None, output_fmt="NCHW", intermediates_only=False):
        """The encoder levels' outputs.

        Args:
            x: Images ``(B, 3, H, W)``, sides multiples of 32.
            indices: The last n levels if int, all if None, else those listed.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Return only the maps.

        Returns:
            The output of `forward_features` and the list of maps; or only that list.

        Raises:
            ValueError: `output_fmt` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(len(self.stages), indices)
        inputs, outputs = self.encode(x)
        maps = [outputs[i] for i in take_indices]
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        return maps if intermediates_only else (self.decode(inputs, outputs[-1]), maps)

    def forward(self, x):
        """Images ``(B, 3, H, W)`` of any size to mask logits ``(B, num_classes, H, W)``.

        Sides that are not multiples of 32 are padded with zeros below and to the right, and the logits cropped.

        Raises:
            ValueError: the number of channels is neither `in_chans` nor one.
        """
        x = with_channels(x, self.in_chans)
        H, W = x.shape[-2:]
        x = self.forward_features(F.pad(x, (0, -W % 32, 0, -H % 32)))
        return self.head(x.permute(0, 3, 1, 2))[..., :H, :W]


# Published names and ours.
_RENAMES = [
    (r"^module\.", ""),
    (r"^vmunet\.", ""),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.seq2seq_engine\.", "."),
    (r"\.op\.mhs\.x_ssproj(_W|\.weight)$", ".mixer.mhs.in_proj.weight"),
    (r"\.op\.mhs\.cat_norm\.", ".mixer.mhs.norm."),
    (r"\.op\.mhs\.y_proj\.", ".mixer.mhs.proj."),
    (r"\.op\.mhs\.scanhead_(\w)\.(?:mambaeng|scanning)\.x_proj_weight$", r".mixer.mhs.heads.\1.x_proj"),
    (r"\.op\.mhs\.scanhead_(\w)\.(?:mambaeng|scanning)\.dt_projs_weight$", r".mixer.mhs.heads.\1.dt_weight"),
    (r"\.op\.mhs\.scanhead_(\w)\.(?:mambaeng|scanning)\.dt_projs_bias$", r".mixer.mhs.heads.\1.dt_bias"),
    (r"\.op\.mhs\.scanhead_(\w)\.(?:mambaeng|scanning)\.A_logs$", r".mixer.mhs.heads.\1.A_log"),
    (r"\.op\.mhs\.scanhead_(\w)\.(?:mambaeng|scanning)\.Ds$", r".mixer.mhs.heads.\1.D"),
    *SS2D_NAMES,
    (r"^patch_embed\.", "stem."),
    (r"^layers_up\.(\d+)\.upsample\.", r"decoder.\1.downsample."),
    (r"^layers_up\.(\d+)\.", r"decoder.\1."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^final_conv\.", "head."),
]


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours; for tensors stored under two names, either name works."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.proj.weight" in state_dict:
        return state_dict
    out = {}
    for key, value in state_dict.items():
        key = rename(key, _RENAMES)
        merging = re.fullmatch(r"layers\.(\d+)\.downsample\.(.*)", key)
        out[f"stages.{int(merging[1]) + 1}.downsample.{merging[2]}" if merging else key] = value
    return reshape_as(out, model)


def _cfg(**kwargs):
    return {
        "num_classes": 1,
        "input_size": (3, 256, 256),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vm_unet.isic18": _cfg(origin_url="https://github.com/JCruan519/VM-UNet", paper_ids="arXiv:2402.02491"),
        "mhs_vm_unet.isic18": _cfg(origin_url="https://github.com/PixDeep/MHS-VM", paper_ids="arXiv:2406.05992"),
    }
)


def _create_vm_unet(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(VMUNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def vm_unet(pretrained=False, **kwargs):
    """VM-UNet."""
    return _create_vm_unet("vm_unet", pretrained, **kwargs)


@register_model
def mhs_vm_unet(pretrained=False, **kwargs):
    """MHS-VM with four heads."""
    return _create_vm_unet("mhs_vm_unet", pretrained, **dict(dict(num_heads=4, gfu_t=0.5), **kwargs))
