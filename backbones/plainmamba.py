"""PlainMamba.

Paper: PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition (BMVC 2024)
- https://arxiv.org/abs/2403.17695

Patch tokens of one width, and layers with one mixer each: a depthwise convolution, then four scans along continuous
paths. The scans share all parameters and are told the direction of each step.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from linzoo.ops import scan_order

from .layers import S6, Conv2dNHWC, Isotropic, unwrap_state_dict
from .layers.checkpoint import rename
from .layers.padding import pad_to_multiple
from .layers.pretrained import imagenet_cfg

__all__ = ["PlainMamba"]


def split(index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of positions on a map; without a remainder, which ONNX does not support for a dynamic width."""
    row = torch.div(index, width, rounding_mode="floor")
    return row, index - row * width


def snakes(H: int, W: int, device: torch.device) -> Tensor:
    """The four paths ``(4, H W)``: rows from the upper left corner, their reverse, columns, their reverse."""
    rows, columns = scan_order.snake(H, W, device), scan_order.snake(W, H, device)
    column, row = split(columns, H)
    columns = row * W + column
    return torch.stack([rows, scan_order.reverse(rows), columns, scan_order.reverse(columns)])


def directions(order: Tensor, W: int) -> Tensor:
    """Direction of the step into each token of paths ``(G, T)``: 0 at the start, 1 right, 2 left, 3 up, 4 down."""
    row, column = (part.diff(dim=1) for part in split(order, W))
    steps = (column > 0) * 1 + (column < 0) * 2 + (row < 0) * 3 + (row > 0) * 4
    return F.pad(steps, (1, 0))


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class PlainMambaMixer(nn.Module):
    """Mamba's block along four snakes, for tokens ``(B, L, C)`` on a grid.

    ``[x, z] = W_in u;  x = SiLU(DWConv7x7(x));  W_out (sum over the paths of S6(x) * SiLU(z))``. A learned vector for
    the step's direction is added to the scan's B.

    Args:
        dim: Channels C.
        d_state: N, states per channel.
        consistent: Whether the step size, B and C follow the path like x, as in the paper. In the authors' code, and so
            in published weights, only x follows it: step t has those of token t in raster order.
    """

    def __init__(self, dim: int, d_state: int = 16, consistent: bool = False, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.consistent = consistent
        self.in_proj = nn.Linear(dim, 4 * dim, **dd)
        self.conv = Conv2dNHWC(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, **dd)
        self.direction = nn.Parameter(torch.empty(5, d_state, **dd))
        self.s6 = S6(2 * dim, 1, d_state, dt_rank=-(-dim // 16), bias_twice=True, **dd)
        self.out_proj = nn.Linear(2 * dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the vectors of the directions."""
        trunc_normal_(self.direction, std=0.02)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv(x.unflatten(1, grid))).flatten(1, 2)
        order = snakes(*grid, u.device).long()  # ONNX indexes only by int64
        place = order.argsort(dim=1)  # the step that visits each token
        projected = F.linear(x, self.s6.x_proj[0])
        projected = projected.unsqueeze(1) if self.consistent else projected[:, place]
        theta = self.direction[directions(order, grid[1]).gather(1, place)]
        projected = projected + F.pad(theta, (self.s6.dt_rank, self.s6.d_state))  # (B, 4, L, R + 2 N)
        y = self.s6.scan(x.unsqueeze(2), projected.transpose(1, 2), order, merge=True)
        return self.out_proj(y * F.silu(z))


@register_notrace_module
class PlainMambaBlock(nn.Module):
    """``x + Mixer(LN(x))`` on tokens ``(B, L, C)``; with `conv`, then ``GELU(BN(DWConv3x3(.)))`` of that."""

    def __init__(
        self, dim: int, drop_path: float = 0.0, conv: bool = False, consistent: bool = False, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = PlainMambaMixer(dim, consistent=consistent, **dd)
        self.drop_path = DropPath(drop_path)
        self.local = None
        if conv:
            depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
            self.local = nn.Sequential(depthwise, nn.BatchNorm2d(dim, **dd), nn.GELU())

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x), grid))
        return x if self.local is None else self.local(x.mT.unflatten(2, grid)).flatten(2).mT


class PatchStem(nn.Module):
    """Images to maps of stride 16: convolutions of stride 2, then 8x8 patches, with zero padding at the border."""

    def __init__(self, in_chans: int, dim: int, convs: int, width: int = 64, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        norm_act = [(nn.BatchNorm2d(width, **dd), nn.ReLU()) for _ in range(convs + 1)]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 7, 2, padding=3, bias=False, **dd), *norm_act[0])
        layers = [(nn.Conv2d(width, width, 3, padding=1, bias=False, **dd), *norm_act[i + 1]) for i in range(convs)]
        self.convs = nn.Sequential(*chain(*layers))
        self.projection = nn.Conv2d(width, dim, 8, 8, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(pad_to_multiple(self.convs(self.stem(x)), 8))


class PlainMamba(Isotropic):
    """PlainMamba (arXiv 2403.17695). It takes images of any size: patches at the borders are padded with zeros.

    Args:
        img_size: Height and width (or one side) of images that fit the position table; interpolated for other sizes.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`.
        dim: Width.
        depth: Layers.
        stem_convs: Convolutions 3x3 in the patch embedding.
        first_conv: Whether the first layer ends in a depthwise convolution.
        consistent: As in `PlainMambaMixer`; False for published weights.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first layer to this.
    """

    antialias_pos_embed = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 192,
        depth: int = 24,
        stem_convs: int = 1,
        first_conv: bool = True,
        consistent: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        whole = tuple(-(-side // 16) * 16 for side in to_2tuple(img_size))
        super().__init__(whole, 16, 16, in_chans, num_classes, global_pool, dim, depth, False, drop_rate, **dd)
        self.patch_embed = PatchStem(in_chans, dim, stem_convs, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            PlainMambaBlock(dim, rate, first_conv and i == 0, consistent, **dd) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.init_weights(needs_reset=False)

    @staticmethod
    def _init_weights(module: nn.Module, needs_reset: bool = False) -> None:
        """Initialises all linear maps alike, including those of S6."""
        Isotropic._init_weights(module, needs_reset)
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, S6):
            module.init_as_linear()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Besides positions: the scans' rates, skips and step biases, and the vectors of the directions."""
        kept = (".s6.A_log", ".s6.D", ".s6.dt_bias", ".direction")
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name.endswith(kept)}

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As in `Isotropic`."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        return x.flatten(2).mT + self.positions(grid), grid


# Published names and ours.
_RENAMES = [
    (r"^backbone\.", ""),
    (r"^layers\.(\d+)\.dw\.", r"blocks.\1.local."),
    (r"^layers\.", "blocks."),
    (r"\.mamba\.conv2d\.", ".mixer.conv."),
    (r"\.mamba\.direction_Bs$", ".mixer.direction"),
    (r"\.mamba\.x_proj\.weight$", ".mixer.s6.x_proj"),
    (r"\.mamba\.dt_proj\.(weight|bias)$", r".mixer.s6.dt_\1"),
    (r"\.mamba\.(A_log|D)$", r".mixer.s6.\1"),
    (r"\.mamba\.", ".mixer."),
    (r"^ln1\.", "norm."),
    (r"^head\.fc\.", "head."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: PlainMamba) -> dict[str, Tensor]:
    """Converts the published state dict to ours, and the position table to the model's grid."""
    out = {rename(key, _RENAMES): value for key, value in unwrap_state_dict(state_dict).items()}
    ours = model.state_dict()
    out = {k: v.unsqueeze(0) if ".s6." in k and v.dim() < ours[k].dim() else v for k, v in out.items() if k in ours}
    out["pos_embed"] = model.fit_positions(out["pos_embed"])
    return out


def _cfg(**kwargs):
    return imagenet_cfg(
        pool_size=None,
        min_input_size=(3, 16, 16),
        first_conv="patch_embed.stem.0",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/ChenhongyiYang/PlainMamba",
        paper_ids="arXiv:2403.17695",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"plainmamba_l{i}.in1k": _cfg() for i in (1, 2, 3)})


def _create_plainmamba(variant: str, pretrained: bool = False, **kwargs) -> PlainMamba:
    depth = kwargs.get("depth", 24)
    return build_model_with_cfg(
        PlainMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(depth * (i + 1) // 4 - 1 for i in range(4)), feature_cls="getter"),
        **kwargs,
    )


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs) -> PlainMamba:
    """PlainMamba-L1."""
    return _create_plainmamba("plainmamba_l1", pretrained, **kwargs)


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs) -> PlainMamba:
    """PlainMamba-L2."""
    model_args = dict(dim=384, stem_convs=2, first_conv=False)
    return _create_plainmamba("plainmamba_l2", pretrained, **dict(model_args, **kwargs))


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs) -> PlainMamba:
    """PlainMamba-L3."""
    model_args = dict(dim=448, depth=36, stem_convs=2, first_conv=False)
    return _create_plainmamba("plainmamba_l3", pretrained, **dict(model_args, **kwargs))
