"""MambaIRv2.

Paper: MambaIRv2: Attentive State Space Restoration (CVPR 2025) - https://arxiv.org/abs/2411.15269

MambaIR's frame around layers of two halves: attention in shifted windows, and one scan of the pixels sorted by content
(ASSM), each followed by a convolutional MLP. A small network assigns every pixel one of a few classes. The scan walks
class by class; a prompt of the class is added to its output projections C. The order is data: a permutation per image.

Maps are channel-last (B, H, W, C) inside; images are NCHW.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_function, register_notrace_module
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from .layers import S6, Conv2dNHWC
from .layers.restoration import RGB_MEAN, ConvMlp, RestorationFrame, convert, restoration_cfg, shift_mask
from .mambair import FRAME_NAMES

__all__ = ["ASSM", "MambaIRv2"]

Noise = Literal["training", "always", "never"]


@register_notrace_module  # FX cannot trace windows, which depend on the map's size
class ShiftedWindowAttention(nn.Module):
    """Swin's attention in windows of a map ``(B, H, W, C)``, which is first rolled by `shift` up and to the left.

    Sides are multiples of `window`. Tokens that are neighbours only because the map is rolled hardly see each other.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int, device=None, dtype=None):
        super().__init__()
        self.window, self.shift = window, shift
        self.attn = WindowAttention(dim, heads, window_size=window, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        size, mask = (self.window, self.window), None
        if self.shift:
            mask, x = shift_mask((H, W), size, (self.shift, self.shift), x), x.roll((-self.shift, -self.shift), (1, 2))
        y = self.attn(window_partition(x, size).flatten(1, 2), mask)
        y = window_reverse(y.unflatten(1, size), size, H, W)
        return y.roll((self.shift, self.shift), (1, 2)) if self.shift else y


@register_notrace_module  # FX cannot trace an order that depends on the image
class ASSM(nn.Module):
    """Attentive state-space module of a map ``(B, H, W, C)`` (section 3.3).

    Every pixel gets a class, the most probable after Gumbel noise. One scan visits the pixels sorted by class, with
    ties in raster order::

        c = argmax(log softmax(route(x)) + noise);   u = W_in x;   u = u * sigmoid(DWConv(u))
        y = S6(u) along sort(c), with C_j + prompt_j at step j;    W_out LN(y)

    `prompt_j` belongs to **pixel** j in raster order, not to the pixel that step j visits. The authors' code does this,
    so published weights need it. In training the gradient reaches the route through the softmax (straight through).

    Args:
        dim: Channels C.
        d_state: N, states per channel.
        classes: Classes of pixels.
        rank: Rank of the table of prompts ``(classes, N)``.
        ratio: Inner width over C.
        noise: When noise is drawn: in "training", "always" (the authors' choice: their results are random), or "never".

    Raises:
        ValueError: unknown `noise`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        classes: int,
        rank: int,
        ratio: float,
        noise: Noise = "training",
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if noise not in ("training", "always", "never"):
            raise ValueError(f"noise: expected 'training', 'always' or 'never', got {noise!r}")
        self.noise = noise
        inner = int(ratio * dim)
        self.route = nn.Sequential(nn.Linear(dim, dim // 3, **dd), nn.GELU(), nn.Linear(dim // 3, classes, **dd))
        self.prompt_classes = nn.Parameter(torch.empty(classes, rank, **dd))
        self.prompt_states = nn.Parameter(torch.empty(rank, d_state, **dd))
        self.in_proj = nn.Linear(dim, inner, **dd)
        self.conv = Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, **dd)
        self.s6 = S6(inner, 1, d_state, **dd)
        self.out_norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.prompt_classes, self.prompt_states):
            nn.init.uniform_(table, -1 / table.shape[0], 1 / table.shape[0])

    def classify(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The class of each token ``(B, L, C)``, one-hot ``(B, L, classes)``, with the softmax's gradient."""
        scores = self.route(x).log_softmax(-1)
        if noise is None and (self.noise == "always" or (self.noise == "training" and self.training)):
            noise = -torch.empty_like(scores).exponential_().log()  # Gumbel's distribution
        scores = scores if noise is None else scores + noise
        soft = scores.softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """A map ``(B, H, W, C)`` to the same; `noise` ``(B, H * W, classes)`` replaces random noise."""
        H, W = x.shape[1:3]
        policy = self.classify(x.flatten(1, 2), noise)
        order = policy.detach().argmax(-1).argsort(dim=-1, stable=True)  # (B, L)
        prompt = policy @ (self.prompt_classes @ self.prompt_states)  # (B, L, N), of step j
        prompt = torch.zeros_like(prompt).scatter(1, order[..., None].expand_as(prompt), prompt)  # of the token there
        u = self.in_proj(x)
        u = (u * self.conv(u).sigmoid()).flatten(1, 2)
        projected = F.linear(u, self.s6.x_proj[0])
        dt_B, C = projected.split([projected.shape[-1] - prompt.shape[-1], prompt.shape[-1]], dim=-1)
        projected = torch.cat([dt_B, C + prompt], -1).unsqueeze(2)
        y = self.s6.scan(u.unsqueeze(2), projected, order.to(torch.int32).unsqueeze(1)).squeeze(2)
        return self.out_proj(self.out_norm(y)).unflatten(1, (H, W))


class Layer(nn.Module):
    """Attention in windows, then ASSM; each, with its MLP, inside a residual connection with learnt scales s.

    ``y = x + MHSA(LN(x));  x = s_1 x + y + MLP(LN(y));  y = x + ASSM(LN(x));  x = s_2 x + y + MLP(LN(y))``.
    """

    def __init__(
        self, dim: int, attention: nn.Module, assm: nn.Module, hidden: int, gated: bool, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp1 = ConvMlp(dim, hidden, gated, **dd)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.assm = assm
        self.norm4 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp2 = ConvMlp(dim, hidden, gated, **dd)
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale1, 1e-4)
        nn.init.constant_(self.scale2, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attn(self.norm1(x))
        x = x * self.scale1 + (y + self.mlp1(self.norm2(y)))
        y = x + self.assm(self.norm3(x))
        return x * self.scale2 + (y + self.mlp2(self.norm4(y)))


@register_notrace_function  # FX cannot trace what depends on the image's size
def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """Images ``(B, C, H, W)``, mirrored below and to the right (edge included) to multiples of `multiple`.

    Raises:
        ValueError: a side is shorter than the padding that it needs.
    """
    for axis in (2, 3):
        side = x.shape[axis]
        padded = side + -side % multiple
        if padded > 2 * side:
            raise ValueError(
                f"x: sides of {tuple(x.shape[2:])} cannot be mirrored to multiples of {multiple}; "
                f"expected {multiple // 2} at least"
            )
        at = torch.arange(padded, device=x.device)
        x = x.index_select(axis, torch.where(at < side, at, 2 * side - 1 - at))
    return x


class MambaIRv2(RestorationFrame):
    """MambaIRv2 (arXiv 2411.15269), for images of any size from half a window up.

    Args:
        in_chans: Channels of the images; RGB images are centred at the mean of DIV2K.
        dim: Inner channels.
        depths: Layers of each group.
        num_heads: Heads of the attention.
        window: Side of its windows; every second layer shifts them by half of it.
        d_state: States per channel of the scans.
        classes: Classes of pixels.
        rank: Rank of the prompts.
        mlp_ratio: Inner width of scans and MLPs over `dim`.
        scale: 2, 3 or 4 for super-resolution; with 1 the network's prediction is added to the image.
        light: Gated MLPs, and a head of one convolution.
        noise: When classes are drawn with Gumbel noise: in "training", "always" as the authors do, or "never".
    """

    def __init__(
        self,
        in_chans: int = 3,
        dim: int = 174,
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6),
        num_heads: int = 6,
        window: int = 16,
        d_state: int = 16,
        classes: int = 128,
        rank: int = 64,
        mlp_ratio: float = 2.0,
        scale: int = 1,
        light: bool = False,
        noise: Noise = "training",
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}

        def layer(i: int, j: int) -> nn.Module:
            attention = ShiftedWindowAttention(dim, num_heads, window, window // 2 if j % 2 else 0, **dd)
            assm = ASSM(dim, d_state, classes, rank, mlp_ratio, noise, **dd)
            return Layer(dim, attention, assm, int(dim * mlp_ratio), light, **dd)

        super().__init__(
            layer,
            in_chans,
            None,
            dim,
            depths,
            scale,
            direct=light or scale == 1,
            residual=scale == 1,
            mean=RGB_MEAN if in_chans == 3 else None,
            **dd,
        )
        self.window = window

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                trunc_normal_(module.relative_position_bias_table, std=0.02)

    def pad(self, x: Tensor) -> Tensor:
        """The image mirrored to multiples of the window."""
        return mirror_pad(x, self.window)


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"\.assm\.selectiveScan\.", ".assm.op."),
    (r"\.win_mhsa\.", ".attn.attn."),
    (r"\.wqkv\.", ".attn.attn.qkv."),
    (r"\.embeddingA\.weight$", ".assm.prompt_states"),
    (r"\.embeddingB\.weight$", ".prompt_classes"),
    (r"\.assm\.in_proj\.0\.", ".assm.in_proj."),
    (r"\.assm\.CPE\.0\.", ".assm.conv."),
    (r"\.convffn(\d)\.", r".mlp\1."),
    (r"\.dwconv\.depthwise_conv\.0\.", ".conv."),
    (r"\.sg\.", "."),
    *FRAME_NAMES,
    (r"\.assm\.mixer\.", ".assm."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MambaIRv2) -> dict[str, Tensor]:
    """Converts the published state dict to ours; token positions in a window are computed, not loaded."""
    found = convert(state_dict, model, _RENAMES)
    return {key: value for key, value in found.items() if not key.endswith("relative_position_index_SA")}


_ORIGIN = dict(origin_url="https://github.com/csguoh/MambaIR", paper_ids="arXiv:2411.15269", license="apache-2.0")

default_cfgs = generate_default_cfgs(
    {
        **{
            f"mambairv2_{size}_x{scale}": restoration_cfg(**_ORIGIN)
            for size in ("light", *"sbl")
            for scale in (2, 3, 4)
        },
        "mambairv2_dn": restoration_cfg(**_ORIGIN),
        "mambairv2_car": restoration_cfg(1, **_ORIGIN),
    }
)


def _create_mambairv2(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        MambaIRv2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("num_classes",),  # output channels equal input channels
        **kwargs,
    )


LIGHT = dict(dim=48, depths=(5, 5, 5, 5), num_heads=4, d_state=8, classes=64, rank=32, mlp_ratio=1.0, light=True)
SMALL = dict(dim=132, depths=(4, 4, 4, 4, 4, 4), num_heads=4)
LARGE = dict(depths=(6,) * 9)


@register_model
def mambairv2_light_x2(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, light, to 2 times the size."""
    return _create_mambairv2("mambairv2_light_x2", pretrained, **dict(dict(LIGHT, scale=2), **kwargs))


@register_model
def mambairv2_light_x3(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, light, to 3 times the size."""
    return _create_mambairv2("mambairv2_light_x3", pretrained, **dict(dict(LIGHT, scale=3), **kwargs))


@register_model
def mambairv2_light_x4(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, light, to 4 times the size."""
    return _create_mambairv2("mambairv2_light_x4", pretrained, **dict(dict(LIGHT, scale=4), **kwargs))


@register_model
def mambairv2_s_x2(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, small, to 2 times the size."""
    return _create_mambairv2("mambairv2_s_x2", pretrained, **dict(dict(SMALL, scale=2), **kwargs))


@register_model
def mambairv2_s_x3(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, small, to 3 times the size."""
    return _create_mambairv2("mambairv2_s_x3", pretrained, **dict(dict(SMALL, scale=3), **kwargs))


@register_model
def mambairv2_s_x4(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, small, to 4 times the size."""
    return _create_mambairv2("mambairv2_s_x4", pretrained, **dict(dict(SMALL, scale=4), **kwargs))


@register_model
def mambairv2_b_x2(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, base, to 2 times the size."""
    return _create_mambairv2("mambairv2_b_x2", pretrained, **dict(dict(scale=2), **kwargs))


@register_model
def mambairv2_b_x3(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, base, to 3 times the size."""
    return _create_mambairv2("mambairv2_b_x3", pretrained, **dict(dict(scale=3), **kwargs))


@register_model
def mambairv2_b_x4(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, base, to 4 times the size."""
    return _create_mambairv2("mambairv2_b_x4", pretrained, **dict(dict(scale=4), **kwargs))


@register_model
def mambairv2_l_x2(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, large, to 2 times the size."""
    return _create_mambairv2("mambairv2_l_x2", pretrained, **dict(dict(LARGE, scale=2), **kwargs))


@register_model
def mambairv2_l_x3(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, large, to 3 times the size."""
    return _create_mambairv2("mambairv2_l_x3", pretrained, **dict(dict(LARGE, scale=3), **kwargs))


@register_model
def mambairv2_l_x4(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2, large, to 4 times the size."""
    return _create_mambairv2("mambairv2_l_x4", pretrained, **dict(dict(LARGE, scale=4), **kwargs))


@register_model
def mambairv2_dn(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2 that removes noise from colour images."""
    return _create_mambairv2("mambairv2_dn", pretrained, **kwargs)


@register_model
def mambairv2_car(pretrained: bool = False, **kwargs) -> MambaIRv2:
    """MambaIRv2 that removes traces of JPEG compression from grey images."""
    return _create_mambairv2("mambairv2_car", pretrained, **dict(dict(in_chans=1), **kwargs))
