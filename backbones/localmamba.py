"""LocalMamba.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan - https://arxiv.org/abs/2403.09338

Vim and VMamba with more ways to walk the map: besides rows and columns also window by window, which keeps neighbours
in the plane close in the sequence. Every layer scans along four of eight routes, found by a search. A gate weights the
channels of each scan before they are summed.
"""

import functools
import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.layers.weight_init import lecun_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import nn

from .layers import SS2D, ChannelGate, Isotropic, Pyramid, RMSNorm, Stage, VimMixer, resize_pos_embed, zero_pad
from .layers.checkpoint import MAMBA_NAMES, SS2D_NAMES, rename, reshape_as, unwrap_state_dict
from .layers.pretrained import imagenet_cfg
from .layers.rope import axial_angles, turn

__all__ = ["LocalVMamba", "LocalVim"]

# Routes: h row by row, v column by column, wK in windows of K x K, row by row within and between them; _flip reverses.
GLOBAL = "h h_flip v v_flip"

# The routes of each layer, from the authors' search (section 4.2).
LOCALVIM_T = (
    "h v_flip w7 w7_flip", "h_flip w2_flip w7 w7_flip", "h h_flip v w7", GLOBAL, GLOBAL, GLOBAL,
    "h_flip v v_flip w7", "h_flip v v_flip w2_flip", GLOBAL, GLOBAL, "h v v_flip w2", "h v v_flip w2_flip",
    "h h_flip v_flip w7", "h_flip v v_flip w2", GLOBAL, "h v w2 w2_flip", "v v_flip w2 w7", "h h_flip v w2",
    "h h_flip w2_flip w7", "v v_flip w2 w2_flip",
)  # fmt: skip
LOCAL_VSSM_T = (
    ("h h_flip w7 w7_flip", "h_flip v_flip w2 w2_flip"),
    ("h_flip v_flip w2_flip w7", "h_flip v v_flip w2"),
    (
        "h h_flip v_flip w2_flip", "h_flip v_flip w2 w2_flip", "h w2_flip w7 w7_flip", GLOBAL, "h v_flip w7 w7_flip",
        "h_flip v w2 w7_flip", "v v_flip w2 w7_flip", "h h_flip v_flip w2_flip", "v_flip w2_flip w7 w7_flip",
    ),
    ("h_flip v_flip w2_flip w7_flip", "h_flip v w7 w7_flip"),
)  # fmt: skip
LOCAL_VSSM_S = (
    ("h v v_flip w7_flip", "h h_flip v w7"),
    ("h_flip v v_flip w7", "h_flip v w2_flip w7"),
    (
        "h_flip v w2_flip w7", "h_flip v_flip w2 w7_flip", "h_flip v v_flip w7", "h v v_flip w7", "h v v_flip w7",
        "h v v_flip w7_flip", GLOBAL, "h v v_flip w2", "v v_flip w2_flip w7", "h h_flip v w2",
        "h_flip v v_flip w7_flip", GLOBAL, "h v v_flip w7_flip", "h v v_flip w7_flip", "h h_flip v_flip w7",
        "h_flip v_flip w2_flip w7", "h_flip v v_flip w7_flip", "v v_flip w7 w7_flip", "h v v_flip w7_flip",
        "h_flip v v_flip w2", "h v v_flip w2_flip", "h h_flip v w7", "h h_flip w7 w7_flip", "h v_flip w2 w2_flip",
        "h v_flip w2 w7", "h v v_flip w7_flip", "h_flip v w2_flip w7",
    ),
    ("h_flip v_flip w7 w7_flip", "h v w7 w7_flip"),
)  # fmt: skip


def filled(n, K):
    """The side n of a map after zeros have filled up its windows of K x K."""
    return (n + K - 1) // K * K  # not -(-n // K): ONNX rounds quotients towards 0


def larger(m, n):
    """The larger of two sides, without a guess at which one that is when `torch.export` asks for any size."""
    return torch.sym_max(m, n) if any(isinstance(side, torch.SymInt) for side in (m, n)) else max(m, n)


def local_orders(H, W, routes, device=None):
    """The orders ``(G, T)`` of several routes over a map and over zeros that fill up windows below and to the right.

    The map's tokens are 0 .. H * W - 1, row by row; the zeros are the tokens after them. A scan treats the zeros in its
    windows like any token. Zeros of other routes' windows come at its end, where they change nothing.
    """
    size = {route: int(route[1]) if route[0] == "w" else 1 for route in routes}
    height, width = (functools.reduce(larger, [filled(n, K) for K in size.values()]) for n in (H, W))
    row, col = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    zero = torch.maximum(row - H, col - W) >= 0  # one comparison: Inductor fails on "or" of a row and a column
    token = torch.where(zero, H * W - 1 + zero.flatten().cumsum(0).view(height, width), row * W + col)
    keys = []
    for route, K in size.items():
        # Windows row by row, and row by row within them; h is windows of one token.
        windowed = (row // K * width + col // K) * K**2 + row % K * K + col % K
        key = col * height + row if route[0] == "v" else windowed
        beyond = torch.maximum(row - filled(H, K), col - filled(W, K)) >= 0
        last = torch.iinfo(key.dtype).max // 2 + row * width + col
        keys.append(torch.where(beyond, last, -key if route.endswith("_flip") else key))
    return token.flatten()[torch.stack(keys).flatten(1).argsort()].to(torch.int32)


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class LocalSS2D(SS2D):
    """VMamba's SS2D along four routes of the layer's own. The gate weights each scan before they are summed."""

    def __init__(self, dim: int, routes: str, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dim, ratio=2.0, d_state=16, gated=True, **dd)
        self.routes = routes.split()
        self.attn = ChannelGate(2 * dim, **dd)

    def scan(self, p):
        H, W = p.shape[1:3]
        order = local_orders(H, W, self.routes, p.device)
        zeros = order.shape[1] - H * W
        y = self.s6(zero_pad(p.flatten(1, 2), (0, 0, 0, zeros)), order)
        y = zero_pad(y, (0, 0, 0, 0, 0, -zeros))
        return self.attn(y).sum(2).unflatten(1, (H, W))


class VSSBlock(nn.Module):
    """``x += SS2D(LN(x))``."""

    def __init__(self, dim: int, routes: str, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = LocalSS2D(dim, routes, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.mixer(self.norm(x)))


class LocalVMamba(Pyramid):
    """LocalVMamba (arXiv 2403.09338): the first version of VMamba with local routes; maps are channel-last.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dims: Channels of each stage.
        routes: The routes of each block of each stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        routes: Sequence[Sequence[str]] = LOCAL_VSSM_T,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        self.stem = PatchEmbed(None, 4, in_chans, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, [len(stage) for stage in routes], stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [VSSBlock(dim, *args, **dd) for args in zip(routes[i], drop_path[i], strict=True)]
            stages.append(Stage(blocks, PatchMerging(dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


class LocalVimMixer(VimMixer):
    """Vim's mixer along four routes of the layer's own, ``(B, L, C)`` on a grid; a class token may be in the middle.

    ``[x, z] = W_in u;  o_i = S6_i(SiLU(conv_i(x))) * SiLU(z);  W_out sum_i o_i * gate(o_i)``. The zeros that fill up
    windows pass through the convolutions, whose biases make them count.
    """

    def __init__(self, dim: int, routes: str, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dim, directions=4, **dd)
        self.routes = routes.split()
        self.attn = ChannelGate(self.in_proj.out_features // 2, **dd)

    def forward(self, u, grid):
        L = u.shape[1]
        M = grid[0] * grid[1]
        x, z = self.in_proj(u).chunk(2, dim=-1)
        order = local_orders(*grid, self.routes, u.device)
        if L > M:  # the class token keeps its own place on every route
            middle = order.new_full((len(self.routes), 1), M // 2)
            order = order + (order >= M // 2)
            order = torch.cat([order[:, : M // 2], middle, order[:, M // 2 :]], dim=1)
        zeros = order.shape[1] - L
        x = zero_pad(x, (0, 0, 0, zeros)).unsqueeze(2).expand(-1, -1, len(self.routes), -1)
        y = zero_pad(self.s6(self.conv(x, order), order), (0, 0, 0, 0, 0, -zeros))
        return self.out_proj(self.attn(y * F.silu(z).unsqueeze(2)).sum(2))


GRID = 14  # side of the map in which positions are measured


def rotate(x, grid, base, theta=10000.0):
    """Rotary positions of tokens ``(B, L, C)`` on a grid. The first C / 2 channels turn with the row, the others with
    the column, pair ``i`` by ``theta ** (-4 i / C)`` per step. A step is 1 / 14 of the map whose grid is `base`. For
    another grid, the tables of cosines and sines are interpolated bicubically.
    """
    row, column = (torch.arange(n, dtype=x.dtype, device=x.device) * (GRID / n) for n in base)
    angle = axial_angles(row, column, x.shape[-1] // 4, theta).permute(2, 0, 1)
    tables = torch.stack([angle.cos(), angle.sin()])
    if torch.compiler.is_exporting() or tuple(grid) != tuple(base):
        tables = F.interpolate(tables, size=tuple(grid), mode="bicubic", align_corners=False)
    return turn(x, *tables.flatten(2).mT)


@register_notrace_module  # FX cannot trace positions, which depend on the map's size
class LocalVimBlock(nn.Module):
    """``r + Mixer(RMS(r))`` with the stream r in float32 whatever the weights' dtype; r is rotated first.

    Args:
        dim: Channels.
        routes: The four routes.
        rope: The grid of the rotary positions, None for no rotation.
        drop_path: Stochastic depth.
    """

    def __init__(
        self, dim: int, routes: str, rope: tuple[int, int] | None, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.rope = rope
        self.norm = RMSNorm(dim, **dd)
        self.mixer = LocalVimMixer(dim, routes, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid):
        if self.rope is not None:
            x = rotate(x, grid, self.rope)
        return x + self.drop_path(self.mixer(self.norm(x), grid)).to(x.dtype)


class LocalVim(Isotropic):
    """LocalVim (arXiv 2403.09338): Vim with local routes.

    Images are padded with zeros, below and to the right, to whole patches.

    Args:
        img_size: Height and width (or one side) of images that fit the position tables; interpolated for other sizes.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`.
        dim: Width.
        routes: The routes of each block.
        class_token: A class token in the middle of the sequence, instead of rotary positions.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 192,
        routes: Sequence[str] = LOCALVIM_T,
        class_token: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        depth = len(routes)
        super().__init__(img_size, 16, 16, in_chans, num_classes, global_pool, dim, depth, class_token, drop_rate, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        args = zip(routes, rates, strict=True)
        rope = None if class_token else self.grid_size
        self.blocks = nn.ModuleList([LocalVimBlock(dim, r, rope, rate, **dd) for r, rate in args])
        self.norm = RMSNorm(dim, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset=True):
        super().init_weights(needs_reset)
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for block in self.blocks:
            out_proj = block.mixer.out_proj.weight
            nn.init.kaiming_uniform_(out_proj, a=math.sqrt(5))
            with torch.no_grad():
                out_proj /= math.sqrt(len(self.blocks))

    @torch.jit.ignore
    def no_weight_decay(self):
        """Besides positions and class token, the skips and step biases: matrices here, vectors in the recipe."""
        scans = {name for name, _ in self.named_parameters() if name.endswith((".s6.D", ".s6.dt_bias"))}
        return super().no_weight_decay() | scans

    @staticmethod
    def _init_weights(module, needs_reset=False):
        """Initialises all linear maps alike, also those of S6: the published models started so, with step bias 0."""
        Isotropic._init_weights(module, needs_reset)
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LocalVimMixer):
            module.s6.init_as_linear()

    def embed(self, x):
        x, grid = super().embed(F.pad(x, (0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size)))
        return x.to(torch.promote_types(x.dtype, torch.float32)), grid


# LocalVMamba's published names, and ours.
_LOCAL_VMAMBA_RENAMES = [
    (r"^patch_embed\.0\.", "stem.proj."),
    (r"^patch_embed\.2\.", "stem.norm."),
    (r"\.op\.multi_scan\.attn\.global_reduce\.", ".mixer.attn.fc1."),
    (r"\.op\.multi_scan\.attn\.channel_select\.", ".mixer.attn.fc2."),
    (r"\.op\.multi_scan\.", ".mixer."),
    *SS2D_NAMES,
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
]
# LocalVim's published names, except those of a mixer's four scans, which are numbered there and stacked here.
_LOCALVIM_RENAMES = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^norm_f\.", "norm."),
    (r"\.attn\.global_reduce\.", ".attn.fc1."),
    (r"\.attn\.channel_select\.", ".attn.fc2."),
    (r"^layers\.", "blocks."),
]


def _local_vmamba_filter_fn(state_dict, model):
    """Converts LocalVMamba's published state dict to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.proj.weight" in state_dict:
        return state_dict
    return reshape_as({rename(key, _LOCAL_VMAMBA_RENAMES): value for key, value in state_dict.items()}, model)


def _localvim_filter_fn(state_dict, model):
    """Converts LocalVim's published state dict to ours, and the position table to the model's grid."""
    state_dict = unwrap_state_dict(state_dict)
    out, scans = {}, {}
    for key, value in state_dict.items():
        if key.startswith("rope."):  # computed here
            continue
        key = rename(key, _LOCALVIM_RENAMES)
        match = re.fullmatch(r"(blocks\.\d+\.mixer\.)(\w+)_(\d)(\..*)?", key)
        if match is None:
            out[key] = value
        else:
            name = match[1] + MAMBA_NAMES[match[2] + (match[4] or "")]
            scans.setdefault(name, {})[int(match[3])] = value
    out |= {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in scans.items()}
    out = reshape_as(out, model)
    pos_embed, class_token = out["pos_embed"], model.cls_token is not None
    if pos_embed.shape != model.pos_embed.shape:
        side = math.isqrt(pos_embed.shape[1])
        out["pos_embed"] = resize_pos_embed(pos_embed, (side, side), model.grid_size, class_token)
    return out


def _cfg(url="", **kwargs):
    return imagenet_cfg(
        url=url and f"https://github.com/hunto/LocalMamba/releases/download/v1.0.0/{url}",
        license="apache-2.0",
        origin_url="https://github.com/hunto/LocalMamba",
        paper_ids="arXiv:2403.09338",
        **kwargs,
    )


_VIM = dict(pool_size=None, min_input_size=(3, 16, 16), first_conv="patch_embed", classifier="head")
_VMAMBA = dict(pool_size=(7, 7), min_input_size=(3, 32, 32), first_conv="stem.proj", classifier="head.fc")

default_cfgs = generate_default_cfgs(
    {
        "localvim_t.in1k": _cfg("local_vim_tiny.ckpt", **_VIM),
        "localvim_t_midcls.in1k": _cfg("local_vim_tiny_middle_cls_token.ckpt", **_VIM),
        "localvim_s.in1k": _cfg(**_VIM),
        "local_vssm_t.in1k": _cfg(**_VMAMBA),
        "local_vssm_s.in1k": _cfg("local_vssm_small.ckpt", **_VMAMBA),
    }
)


def _create_localvim(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        LocalVim,
        variant,
        pretrained,
        pretrained_filter_fn=_localvim_filter_fn,
        feature_cfg=dict(out_indices=(4, 9, 14, 19), feature_cls="getter"),
        **kwargs,
    )


def _create_local_vmamba(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        LocalVMamba,
        variant,
        pretrained,
        pretrained_filter_fn=_local_vmamba_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def localvim_t(pretrained=False, **kwargs):
    """LocalVim-T."""
    return _create_localvim("localvim_t", pretrained, **kwargs)


@register_model
def localvim_t_midcls(pretrained=False, **kwargs):
    """LocalVim-T with a class token in the middle instead of rotary positions."""
    model_args = dict(class_token=True, global_pool="token")
    return _create_localvim("localvim_t_midcls", pretrained, **dict(model_args, **kwargs))


@register_model
def localvim_s(pretrained=False, **kwargs):
    """LocalVim-S; its routes are the same in all layers."""
    model_args = dict(dim=384, routes=("h h_flip w2 w2_flip",) * 20)
    return _create_localvim("localvim_s", pretrained, **dict(model_args, **kwargs))


@register_model
def local_vssm_t(pretrained=False, **kwargs):
    """LocalVMamba-T."""
    return _create_local_vmamba("local_vssm_t", pretrained, **dict(dict(routes=LOCAL_VSSM_T), **kwargs))


@register_model
def local_vssm_s(pretrained=False, **kwargs):
    """LocalVMamba-S."""
    return _create_local_vmamba("local_vssm_s", pretrained, **dict(dict(routes=LOCAL_VSSM_S), **kwargs))
