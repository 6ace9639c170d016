"""RGT.

Paper: Recursive Generalization Transformer for Image Super-Resolution (ICLR 2024) - https://arxiv.org/abs/2303.06373

The frame of SwinIR around blocks that alternate two kinds of attention. L-SA attends in rectangular windows. In RG-SA
all pixels attend to the few tokens that one convolution of stride 4, applied repeatedly, leaves of the map; this is
linear in pixels. Each block adds its input once more, weighted per channel (hybrid adaptive integration).

Maps are channel-last (B, H, W, C) inside; images are NCHW.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from .layers import Conv2dNHWC
from .layers.restoration import (
    BODY_NAMES,
    RGB_MEAN,
    ConvMlp,
    RestorationFrame,
    convert,
    restoration_cfg,
    shift_mask,
)

__all__ = ["RGSA", "RGT"]


class PositionBias(nn.Module):
    """A small MLP's bias for the offset between two tokens of a window ``(h, w)``: ``(heads, h w, h w)``."""

    def __init__(self, window: tuple[int, int], heads: int, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.window = window
        layers: list[nn.Module] = [nn.Linear(2, dim, **dd)]
        for width in (dim, dim, heads):
            layers += [nn.LayerNorm(dim, eps=1e-5, **dd), nn.ReLU(), nn.Linear(dim, width, **dd)]
        self.mlp = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        h, w = self.window
        weight = self.mlp[0].weight
        rows, columns = (torch.arange(1 - n, n, device=weight.device) for n in self.window)
        offsets = torch.cartesian_prod(rows, columns).to(weight.dtype)
        bias = self.mlp(offsets).view(2 * h - 1, 2 * w - 1, -1)
        dy, dx = (torch.arange(n, device=weight.device) for n in self.window)
        dy, dx = dy[:, None] - dy + h - 1, dx[:, None] - dx + w - 1
        return bias[dy[:, None, :, None], dx[None, :, None, :]].flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


@register_notrace_module  # FX cannot trace windows, which depend on the map's size
class LSA(nn.Module):
    """Local attention of a map ``(B, H, W, C)`` (section 3.2), half of the heads in flat windows, half in tall ones.

    ``W_out([MHSA_flat, MHSA_tall] + DWConv(V))``. Queries, keys and values are padded with zeros to multiples of the
    window's longer side; the padding is attended to as well. `shift` moves the windows by half their sides.

    Args:
        dim: Channels C.
        heads: Heads, an even number.
        window: Height and width of the flat windows; the tall ones are rotated by 90 degrees.
        shift: Whether the windows are moved.
    """

    def __init__(self, dim: int, heads: int, window: tuple[int, int], shift: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.heads, self.shift = heads, shift
        self.windows = (window, window[::-1])
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.conv = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.bias = nn.ModuleList(PositionBias(size, heads // 2, dim // 32, **dd) for size in self.windows)
        self.proj = nn.Linear(dim, dim, **dd)

    def attend(self, qkv: Tensor, window: tuple[int, int], bias: Tensor) -> Tensor:
        """Queries, keys and values ``(B, H, W, 3 C / 2)`` in windows, to ``(B, H, W, C / 2)``."""
        B, H, W = qkv.shape[:3]
        shift = (window[0] // 2, window[1] // 2)
        if self.shift:
            qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
            bias = bias + shift_mask((H, W), window, shift, qkv)[:, None]  # (windows, heads, tokens, tokens)
        q, k, v = (
            window_partition(qkv, window)
            .view(B, -1, window[0] * window[1], 3, self.heads // 2, qkv.shape[-1] // (3 * (self.heads // 2)))
            .permute(3, 0, 1, 4, 2, 5)
        )
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(2, 3).flatten(3).flatten(0, 1)
        y = window_reverse(y.unflatten(1, window), window, H, W)
        return y.roll(shift, (1, 2)) if self.shift else y

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv, side = self.qkv(x), max(self.windows[0])
        local = self.conv(qkv[..., 2 * C :])
        qkv = F.pad(qkv, (0, 0, 0, -W % side, 0, -H % side)).unflatten(-1, (3, 2, C // 2))
        halves = [
            self.attend(qkv[..., i, :].flatten(3), window, bias())
            for i, (window, bias) in enumerate(zip(self.windows, self.bias, strict=True))
        ]
        return self.proj(torch.cat(halves, -1)[:, :H, :W] + local)


@register_notrace_module  # FX cannot trace the number of reductions, which depends on the map's size
class RGSA(nn.Module):
    """Recursive-generalisation attention of a map ``(B, H, W, C)`` (section 3.1)::

        t = x;  n times: t = DWConv_4x4(t), of stride 4, always the same weights
        t = GELU(LN(Conv_1x1(DWConv_3x3(t))));    q = W_q x,  k = W_k t,  v = W_v t
        W_out softmax(q k^T / sqrt(d)) (v + DWConv_3x3(v))

    Each pixel attends to about ``H W / 16^n`` tokens. n grows by 1 when the longer side grows fourfold. In evaluation
    it is 2 below 1024; in training it is 1 from 16 on, so that at 64 both are 2.

    Args:
        dim: Channels C.
        heads: Heads.
        ratio: Width of queries and keys over C.

    Raises:
        ValueError: the shorter side is less than ``4^n``, so nothing would be left.
    """

    def __init__(self, dim: int, heads: int, ratio: float = 0.5, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(dim * ratio)
        self.heads = heads
        self.reduction = Conv2dNHWC(dim, dim, 4, 4, groups=dim, **dd)
        self.dwconv = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.conv = Conv2dNHWC(dim, inner, 1, **dd)
        self.norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.q = nn.Linear(dim, inner, **dd)
        self.k = nn.Linear(inner, inner, **dd)
        self.v = nn.Linear(inner, dim, **dd)
        self.cpe = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def reductions(self, H: int, W: int) -> int:
        """n for a map of this size."""
        least, first = (0, 16) if self.training else (2, 1024)
        n = least + sum(max(H, W) >= first * 4**k for k in range(8))
        if min(H, W) < 4**n:
            raise ValueError(
                f"x: a map of {H} x {W} is reduced {n} times to a fourth; expected sides of {4**n} at least"
            )
        return n

    def forward(self, x: Tensor) -> Tensor:
        t = x
        for _ in range(self.reductions(x.shape[1], x.shape[2])):
            t = self.reduction(t)
        t = F.gelu(self.norm(self.conv(self.dwconv(t))))
        v = self.v(t)
        v = v + self.cpe(v)
        q, k, v = (y.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(t), v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y.view(x.shape))


class Block(nn.Module):
    """``y = x + Attn(LN(x));  y = y + MLP(LN(y));  y + s x`` with learnt weights s per channel."""

    def __init__(self, dim: int, attention: nn.Module, hidden: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = ConvMlp(dim, hidden, gated=True, kernel_size=3, **dd)
        self.scale = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.drop_path(self.attn(self.norm1(x)))
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return y + x * self.scale


class RGT(RestorationFrame):
    """RGT (arXiv 2303.06373), for images of 16 x 16 and more.

    Args:
        in_chans: Channels of the images; RGB images are centred at the mean of DIV2K.
        dim: Inner channels.
        depths: Blocks of each group.
        num_heads: Heads of the attention.
        window: Height and width of the flat windows.
        mlp_ratio: Inner width of the MLPs over `dim`.
        qk_ratio: Width of queries and keys of RG-SA over `dim`.
        scale: 2, 3 or 4.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        dim: int = 180,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6, 6, 6),
        num_heads: int = 6,
        window: tuple[int, int] = (8, 32),
        mlp_ratio: float = 2.0,
        qk_ratio: float = 0.5,
        scale: int = 2,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(i: int, j: int) -> nn.Module:
            if j % 2:
                attention = RGSA(dim, num_heads, qk_ratio, **dd)
            else:  # shift block 2 of even groups, and blocks 0 and 4 of odd ones
                attention = LSA(dim, num_heads, window, bool((j // 2 + i) % 2), **dd)
            return Block(dim, attention, int(dim * mlp_ratio), rates[sum(depths[:i]) + j], **dd)

        super().__init__(
            block,
            in_chans,
            None,
            dim,
            depths,
            scale,
            direct=False,
            residual=False,
            mean=RGB_MEAN if in_chans == 3 else None,
            **dd,
        )


RGSA_NAMES = [(r"reduction1\.", "reduction."), (r"norm_act\.0\.", "norm.")]
_RENAMES = [
    *BODY_NAMES,
    (r"^before_RG\.1\.", "stem_norm."),
    (r"\.gamma$", ".scale"),
    (r"\.mlp\.sg\.", ".mlp."),
    (r"\.get_v\.", ".conv."),
    (r"\.attns\.(\d)\.pos\.pos_proj\.", r".bias.\1.mlp.0."),
    *((rf"\.attns\.(\d)\.pos\.pos{i}\.0\.", rf".bias.\1.mlp.{3 * i - 2}.") for i in (1, 2, 3)),
    *((rf"\.attns\.(\d)\.pos\.pos{i}\.2\.", rf".bias.\1.mlp.{3 * i}.") for i in (1, 2, 3)),
    *((rf"\.attn\.{theirs}", f".attn.{ours}") for theirs, ours in RGSA_NAMES),
]
_COMPUTED = ("rpe_biases", "relative_position_index", "attn_mask_0", "attn_mask_1")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RGT) -> dict[str, Tensor]:
    """Converts the published state dict to ours; positions and masks are computed, not loaded."""
    found = convert(state_dict, model, _RENAMES)
    return {key: value for key, value in found.items() if not key.endswith(_COMPUTED)}


_ORIGIN = dict(origin_url="https://github.com/zhengchen1999/RGT", paper_ids="arXiv:2303.06373", license="apache-2.0")

default_cfgs = generate_default_cfgs(
    {f"{name}_x{scale}": restoration_cfg(**_ORIGIN) for name in ("rgt", "rgt_s") for scale in (2, 3, 4)}
)


def _create_rgt(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        RGT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes",),  # output channels equal input channels
        **kwargs,
    )


SMALL = dict(depths=(6, 6, 6, 6, 6, 6))


@register_model
def rgt_x2(pretrained: bool = False, **kwargs) -> RGT:
    """RGT to 2 times the size."""
    return _create_rgt("rgt_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def rgt_x3(pretrained: bool = False, **kwargs) -> RGT:
    """RGT to 3 times the size."""
    return _create_rgt("rgt_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def rgt_x4(pretrained: bool = False, **kwargs) -> RGT:
    """RGT to 4 times the size."""
    return _create_rgt("rgt_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def rgt_s_x2(pretrained: bool = False, **kwargs) -> RGT:
    """RGT, small, to 2 times the size."""
    return _create_rgt("rgt_s_x2", pretrained, **dict(dict(SMALL, scale=2), **kwargs))


@register_model
def rgt_s_x3(pretrained: bool = False, **kwargs) -> RGT:
    """RGT, small, to 3 times the size."""
    return _create_rgt("rgt_s_x3", pretrained, **dict(dict(SMALL, scale=3), **kwargs))


@register_model
def rgt_s_x4(pretrained: bool = False, **kwargs) -> RGT:
    """RGT, small, to 4 times the size."""
    return _create_rgt("rgt_s_x4", pretrained, **dict(dict(SMALL, scale=4), **kwargs))
