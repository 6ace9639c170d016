"""VFIMamba.

Paper: VFIMamba: Video Frame Interpolation with State Space Models (NeurIPS 2024) - https://arxiv.org/abs/2407.02315

It takes two frames and a time between them, and returns the frame at that time. There are features at five scales; at
the last two, scans over interleaved tokens mix the frames. From these features it computes, coarse to fine, the flow
from the new frame to each of the two; then a local refinement of the flow; then a U-Net's residual for the blend of
the two warped frames. The cost is linear in pixels.

Images and maps are (B, C, H, W), but channel-last in the blocks that scan. Maps of both frames are stacked along the
batch, all first frames before all second ones.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from linzoo.ops import scan_order

from .layers import SS2D
from .layers.checkpoint import rename, reshape_as, unwrap_state_dict
from .layers.scan_block import CONV_MIXER_NAMES, SCAN_BLOCK_NAMES, ScanBlock
from .layers.script import refuse_script

__all__ = ["InterleavedSS2D", "Motion", "VFIMamba", "warp"]


class Motion(NamedTuple):
    """Motion from the new frame to the two: in pixels, x before y.

    Attributes:
        flow: ``(B, 4, H, W)``, to the first frame, then to the second.
        mask: Weight of the first frame, before its sigmoid ``(B, 1, H, W)``.
    """

    flow: Tensor
    mask: Tensor

    def __add__(self, other: "Motion") -> "Motion":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Motion(self.flow + other.flow, self.mask + other.mask)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """The image ``(B, C, H, W)`` sampled where `flow` ``(B, 2, H, W)`` points, bilinear; the edge is replicated."""
    H, W = image.shape[2:]
    y = torch.linspace(-1, 1, H, device=image.device, dtype=image.dtype).view(1, H, 1).expand(1, H, W)
    x = torch.linspace(-1, 1, W, device=image.device, dtype=image.dtype).view(1, 1, W).expand(1, H, W)
    at = torch.stack([x + flow[:, 0] / ((W - 1) / 2), y + flow[:, 1] / ((H - 1) / 2)], -1)
    return F.grid_sample(image, at.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=True)


def resize(x: Tensor, H: int, W: int) -> Tensor:
    """A map at another size, bilinear."""
    return x if x.shape[2:] == (H, W) else F.interpolate(x, (H, W), mode="bilinear", align_corners=False)


def resize_flow(flow: Tensor, H: int, W: int) -> Tensor:
    """A flow at another size, in pixels of that size; it is scaled by the ratio of the widths."""
    return resize(flow, H, W) * (W / flow.shape[3])


def conv(dim: int, dim_out: int, stride: int = 1, size: int = 3, **dd) -> nn.Sequential:
    """A convolution and PReLU."""
    return nn.Sequential(nn.Conv2d(dim, dim_out, size, stride, size // 2, **dd), nn.PReLU(dim_out, **dd))


def up_conv(dim: int, dim_out: int, **dd) -> nn.Sequential:
    """Twice the size, and PReLU."""
    return nn.Sequential(nn.ConvTranspose2d(dim, dim_out, 4, 2, 1, **dd), nn.PReLU(dim_out, **dd))


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class InterleavedSS2D(SS2D):
    """`SS2D` over pairs of maps ``(2 B, H, W, C)``; the four scans visit their tokens in turns (section 3.2).

    With `transposed_halves` the scans along columns put their results where the authors' code does
    (`scan_order.interleaved_places`); otherwise where they belong.
    """

    def __init__(self, *args, transposed_halves: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.transposed_halves = transposed_halves

    def scan(self, p: Tensor) -> Tensor:
        H, W = p.shape[1:3]
        tokens = torch.cat(p.flatten(1, 2).chunk(2), 1)  # (B, 2 H W, D)
        read = scan_order.interleaved(H, W, p.device)
        if self.transposed_halves:
            y = self.s6(tokens, read)
            write = scan_order.interleaved_places(H, W, p.device)
            # the token of step t becomes that of place write[t], reversed or not
            source = torch.zeros_like(read[1]).scatter(0, write[1].long(), read[1])
            y = y[:, :, 0::2].sum(2) + y[:, :, 1::2].sum(2).index_select(1, source)
        else:
            y = self.s6(tokens, read, merge=True)
        return torch.cat(y.chunk(2, 1)).unflatten(1, (H, W))


class MixedStage(nn.Module):
    """LayerNorm, a convolution of stride 2, and blocks that mix the two frames."""

    def __init__(self, dim: int, dim_out: int, depth: int, transposed_halves: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.down = nn.Conv2d(dim, dim_out, 3, 2, 1, **dd)
        scan = dict(ratio=2.0, d_state=16, gated=True, transposed_halves=transposed_halves)
        self.blocks = nn.Sequential(
            *(ScanBlock(dim_out, InterleavedSS2D(dim_out, **scan, **dd), **dd) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Head(nn.Module):
    """A first motion, or an update of one, from features of both frames at 1/`stride` of the size."""

    def __init__(self, dim: int, images: int, hidden: int, stride: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.stride = stride
        self.conv = nn.Sequential(
            conv(2 * dim // 16 + images, hidden, **dd), conv(hidden, hidden, **dd), conv(hidden, 5, **dd)
        )

    def forward(self, features: Tensor, images: Tensor, flow: Tensor | None) -> Motion:
        """Features ``(2 B, C, h, w)``; images stacked along channels and the flow so far, both at full size."""
        H, W = images.shape[2:]
        features = F.pixel_shuffle(F.pixel_shuffle(torch.cat(features.chunk(2), 1), 2), 2)
        size = (4 * H // self.stride, 4 * W // self.stride)
        parts = [features, resize(images, *size), *([] if flow is None else [resize(flow, *size) * 4 / self.stride])]
        found = resize(self.conv(torch.cat(parts, 1)), H, W)
        return Motion(found[:, :4] * (self.stride / 4), found[:, 4:])


class LocalBlock(nn.Module):
    """Update of a motion, from the images and their warps at 1/`scale` of the size."""

    def __init__(self, dim: int, scale: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.scale = scale
        self.down = nn.Sequential(conv(17, dim // 2, 2, **dd), conv(dim // 2, dim, 2, **dd))
        self.body = nn.Sequential(*(conv(dim, dim, **dd) for _ in range(8)))
        self.up = nn.ConvTranspose2d(dim, 5, 4, 2, 1, **dd)

    def forward(self, images: Tensor, flow: Tensor) -> Motion:
        H, W = images.shape[2:]
        size = (H // self.scale, W // self.scale)
        x = self.down(torch.cat([resize(images, *size), resize(flow, *size) / self.scale], 1))
        found = resize(self.up(self.body(x) + x), H, W)
        return Motion(found[:, :4] * (2 * self.scale), found[:, 4:])


class Refiner(nn.Module):
    """A U-Net for the residual of the blend, in (0, 1), before it is stretched to [-1, 1]."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        widths = [(17 + dim, 2 * dim), (4 * dim, 4 * dim), (8 * dim, 8 * dim), (16 * dim, 16 * dim)]
        self.down = nn.ModuleList(nn.Sequential(conv(a, b, 2, **dd), conv(b, b, **dd)) for a, b in widths)
        ups = [(32 * dim, 8 * dim), (16 * dim, 4 * dim), (8 * dim, 2 * dim), (4 * dim, dim)]
        self.up = nn.ModuleList(up_conv(a, b, **dd) for a, b in ups)
        self.conv = nn.Conv2d(dim, 3, 3, padding=1, **dd)

    def forward(self, images: Tensor, flow: Tensor, features: list[Tensor]) -> Tensor:
        """Images, warps and mask stacked along channels, the flow, and each scale's features of both frames."""
        pairs, at = [], flow
        for level in features:
            at = resize_flow(at, *level.shape[2:])
            first, second = level.chunk(2)
            pairs.append(torch.cat([warp(first, at[:, :2]), warp(second, at[:, 2:])], 1))
        skips, x = [], torch.cat([images, flow, pairs[0]], 1)
        for down, pair in zip(self.down, pairs[1:], strict=True):
            skips.append(down(x))
            x = torch.cat([skips[-1], pair], 1)
        for up, skip in zip(self.up, [*skips[2::-1], None], strict=True):
            x = up(x)
            x = x if skip is None else torch.cat([x, skip], 1)
        return self.conv(x).sigmoid()


class VFIMamba(nn.Module):
    """VFIMamba (arXiv 2407.02315), for frames of any size.

    Args:
        dim: Channels F of the first scale; they double at each of the four others.
        depth: Blocks at each of the two scales that mix frames.
        transposed_halves: See `InterleavedSS2D`; the published weights need it.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, dim: int = 32, depth: int = 3, transposed_halves: bool = True, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.in_chans = self.num_classes = 3
        dims = [dim * 2**i for i in range(5)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [dict(num_chs=n, reduction=2**i, module=f"stages.{i}") for i, n in enumerate(dims)]
        stages: list[nn.Module] = [nn.Sequential(conv(3, dim, **dd), conv(dim, dim, **dd))]
        for a, b in zip(dims[:2], dims[1:3], strict=True):
            stages.append(nn.Sequential(conv(a, b, 2, **dd), conv(b, b, **dd), conv(b, b, **dd)))
        for a, b in zip(dims[2:4], dims[3:], strict=True):
            stages.append(MixedStage(a, b, depth, transposed_halves, **dd))
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList((Head(dims[4], 7, 4 * dim, 16, **dd), Head(dims[3], 14 + 4, 4 * dim, 8, **dd)))
        self.local = nn.ModuleList(LocalBlock(4 * dim, scale, **dd) for scale in (2, 1))
        self.refiner = Refiner(2 * dim, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in (*self.stages.modules(), *self.refiner.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scans' skips D: matrices here, but vectors in the published recipe."""
        return {name for name, _ in self.named_parameters() if name.endswith(".s6.D")}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The convolution that outputs the residual."""
        return self.refiner.conv

    def forward_features(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """The maps of both frames at five scales ``(2 B, C, h, w)``."""
        x, maps = torch.cat([first, second]), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def stack(self, first: Tensor, second: Tensor, motion: Motion) -> Tensor:
        """Frames, their warps and the mask ``(B, 13, H, W)``."""
        warped = warp(first, motion.flow[:, :2]), warp(second, motion.flow[:, 2:])
        return torch.cat([first, second, *warped, motion.mask], 1)

    def blend(self, first: Tensor, second: Tensor, motion: Motion) -> Tensor:
        """The two warped frames, blended by the mask."""
        share = motion.mask.sigmoid()
        return warp(first, motion.flow[:, :2]) * share + warp(second, motion.flow[:, 2:]) * (1 - share)

    def run_heads(self, first: Tensor, second: Tensor, time: Tensor, features: list[Tensor]) -> list[Motion]:
        """The motions after each head."""
        at = time.to(first).view(-1, 1, 1, 1).expand(len(first), 1, *first.shape[2:])
        motions = [self.heads[0](features[4], torch.cat([first, second, at], 1), None)]
        images = torch.cat([self.stack(first, second, motions[0]), at], 1)
        motions.append(motions[0] + self.heads[1](features[3], images, motions[0].flow))
        return motions

    def run_local(self, first: Tensor, second: Tensor, motion: Motion) -> list[Motion]:
        """The motions after each local block."""
        motions = []
        for block in self.local:
            motion = motion + block(self.stack(first, second, motion), motion.flow)
            motions.append(motion)
        return motions

    def run(
        self,
        first: Tensor,
        second: Tensor,
        time: float | Tensor = 0.5,
        local: bool = True,
        scale: float = 1.0,
        high_resolution: bool = False,
    ) -> dict:
        """As `forward`, without padding, and with intermediate results.

        Returns:
            "frame" ``(B, 3, H, W)``; "merged", the blend before the residual; "residual" in (0, 1); "motion"; "motions"
            of the heads, or of the local blocks if there are any; "features".

        Raises:
            ValueError: the frames differ in shape or have a wrong number of channels; sides are not multiples of 16 or
                are below 32, also at the scale of the heads; the time is outside [0, 1].
        """
        if first.dim() != 4 or first.shape[1] != 3 or first.shape != second.shape:
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise ValueError(f"first, second: expected two of one shape (B, 3, H, W), got {shapes}")
        H, W = first.shape[2:]
        h, w = round(H * scale), round(W * scale)
        for sides in ((H, W), (h, w)):
            if min(sides) < 32 or any(side % 16 for side in sides):
                raise ValueError(f"first: expected sides of 32 at least that are multiples of 16, got {sides}")
        time = torch.as_tensor(time)
        if not torch.compiler.is_compiling() and not time.is_meta and not ((time >= 0) & (time <= 1)).all():
            raise ValueError(f"time: expected 0 to 1, got {time.tolist()}")
        low = [resize(x, h, w) for x in (first, second)]
        features = self.forward_features(*low)
        motions = self.run_heads(*low, time, features)
        if local and high_resolution:
            motions = self.run_local(*low, motions[-1])
        if (h, w) != (H, W):
            motions = [Motion(resize_flow(m.flow, H, W), resize(m.mask, H, W)) for m in motions]
            features = self.forward_features(first, second)
        if local and not high_resolution:
            motions = self.run_local(first, second, motions[-1])
        motion = motions[-1]
        merged = self.blend(first, second, motion)
        residual = self.refiner(self.stack(first, second, motion), motion.flow, features)
        frame = (merged + 2 * residual - 1).clamp(0, 1)
        return dict(frame=frame, merged=merged, residual=residual, motion=motion, motions=motions, features=features)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        time: float | Tensor = 0.5,
        local: bool = True,
        scale: float = 1.0,
        high_resolution: bool = False,
        flip: bool = False,
    ) -> Tensor:
        """Returns the frame between two.

        Args:
            first, second: ``(B, 3, H, W)``, white at 1, of any size: edges are repeated as far as the scales need. The
                published weights take channels as blue, green, red.
            time: Position between them, 0 to 1: one for all, or ``(B,)``.
            local: Refine the flow at the frames' own resolution.
            scale: Resize factor of the frames for features and flow, such as 1/2 for 2K and 1/4 for 4K.
            high_resolution: Also refine locally at that scale.
            flip: Average with the result for the frames turned upside down (test-time augmentation).

        Returns:
            ``(B, 3, H, W)``, in [0, 1].

        Raises:
            ValueError: see `run`.
        """
        if flip:
            turned = (x.flip(2, 3) for x in (first, second))
            both = [(first, second), turned]
            plain, other = (self.forward(*pair, time, local, scale, high_resolution) for pair in both)
            return (plain + other.flip(2, 3)) / 2
        H, W = first.shape[2:]
        step = max(32, round(32 / scale))
        fits = all(n >= step and n % (step // 2) == 0 for n in (H, W))
        down, right = (0 if fits else -n % step for n in (H, W))
        top, left = down // 2, right // 2
        edges = (left, right - left, top, down - top)
        padded = (F.pad(x, edges, mode="replicate") if x.dim() == 4 else x for x in (first, second))
        frame = self.run(*padded, time, local, scale, high_resolution)["frame"]
        return frame[:, :, top : top + H, left : left + W]


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^feature_bone\.block0\.conv\.([02])\.", lambda m: f"stages.0.{int(m[1]) // 2}.0."),
    (r"^feature_bone\.block0\.conv\.([13])\.", lambda m: f"stages.0.{int(m[1]) // 2}.1."),
    (r"^feature_bone\.patch_embed([12])\.", r"stages.\1.0."),
    (r"^feature_bone\.block([12])\.conv\.([02])\.", lambda m: f"stages.{m[1]}.{int(m[2]) // 2 + 1}.0."),
    (r"^feature_bone\.block([12])\.conv\.([13])\.", lambda m: f"stages.{m[1]}.{int(m[2]) // 2 + 1}.1."),
    (r"^feature_bone\.patch_embed([34])\.proj\.", r"stages.\1.down."),
    (r"^feature_bone\.patch_embed([34])\.norm\.", r"stages.\1.norm."),
    (r"^feature_bone\.block([34])\.", r"stages.\1."),
    *SCAN_BLOCK_NAMES,
    *CONV_MIXER_NAMES,
    (r"^block\.", "heads."),
    (r"^local_block\.(\d)\.conv0\.", r"local.\1.down."),
    (r"^local_block\.(\d)\.convblock\.", r"local.\1.body."),
    (r"^local_block\.(\d)\.lastconv\.", r"local.\1.up."),
    (r"^unet\.down(\d)\.conv([12])\.", lambda m: f"refiner.down.{m[1]}.{int(m[2]) - 1}."),
    (r"^unet\.up(\d)\.", r"refiner.up.\1."),
    (r"^unet\.", "refiner."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VFIMamba) -> dict[str, Tensor]:
    """Converts the published state dict to ours; its names may start with ``module.``."""
    state_dict = {key.removeprefix("module."): x for key, x in unwrap_state_dict(state_dict).items()}
    if "refiner.conv.weight" in state_dict:
        return state_dict
    computed = ("attn_mask", "HW")
    kept = {key: x for key, x in state_dict.items() if not any(name in key for name in computed)}
    return reshape_as({rename(key, _RENAMES): x for key, x in kept.items()}, model)


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 3,
        "input_size": (3, 256, 256),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "first_conv": "stages.0.0.0",
        "classifier": "refiner.conv",
        "paper_ids": "arXiv:2407.02315",
        "origin_url": "https://github.com/MCG-NJU/VFIMamba",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"vfimamba": _cfg(), "vfimamba_s": _cfg()})


def _create_vfimamba(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        VFIMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes", "in_chans"),
        **kwargs,
    )


@register_model
def vfimamba(pretrained: bool = False, **kwargs) -> VFIMamba:
    """VFIMamba."""
    return _create_vfimamba("vfimamba", pretrained, **kwargs)


@register_model
def vfimamba_s(pretrained: bool = False, **kwargs) -> VFIMamba:
    """VFIMamba, small."""
    return _create_vfimamba("vfimamba_s", pretrained, **dict(dict(dim=16), **kwargs))
