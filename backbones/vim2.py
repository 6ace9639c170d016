"""ViM2, the vision model of MambaMixer.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection (version 1)
- https://arxiv.org/abs/2403.19888

Blocks mix tokens with a gated SS2D whose step sizes, B and C come from the block's input. They mix channels with
selective scans along the channel axis. Each mixer reads a learned weighted average of the outputs of all earlier mixers
in its stage.

No code or weights were published. Choices that the paper leaves open are made here and listed in the model card.
Maps are channel-last (B, H, W, C) throughout.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import nn

from linzoo.ops import scan_order, selective_scan

from .layers import SS2D, Conv2dNHWC, Pyramid, WeightedAverage
from .layers.pretrained import imagenet_cfg
from .layers.s6 import S6, init_step_bias

__all__ = ["ViM2"]


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class TokenMixer(SS2D):
    """Selective token mixer: ``[v, z] = W_in x;  p = SiLU(DWConv(v));  W_out (LN(sum_k S6_k(p)) * SiLU(z))``.

    It is VMamba's gated SS2D, but step size, B and C of the four scans are linear in the block's input x.
    """

    def __init__(self, dim: int, ratio: float = 2.0, d_state: int = 16, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dim, ratio, d_state, gated=True, **dd)
        self.s6 = S6(int(ratio * dim), 4, d_state, math.ceil(dim / 16), selects_from=dim, **dd)

    def forward(self, x):
        H, W = x.shape[1:3]
        v, gate = self.in_proj(x).chunk(2, dim=-1)
        p = F.silu(self.conv(v)).flatten(1, 2).unsqueeze(2)
        selection = F.linear(x.flatten(1, 2), self.s6.x_proj.flatten(0, 1)).unflatten(-1, (4, -1))
        y = self.s6.scan(p, selection, scan_order.cross(H, W, x.device), merge=True).unflatten(1, (H, W))
        return self.out_proj(self.out_norm(y) * F.silu(gate))


@register_notrace_module  # FX cannot trace the expansion to every token
class ChannelScan(nn.Module):
    """Selective scans along the channels of a map: the selective scan, with tokens and channels exchanged.

    Channel c of the map, averaged over `grid` x `grid` cells and read in the k-th of the token mixer's four orders, is
    the vector p_{k,c} that controls the selection. For each token l::

        [r_c, B_c, C_c] = W p_c;   delta_c = softplus(r_c + b)
        h_{c,l} = exp(delta_c A) h_{c-1,l} + delta_c B_c v_{c,l};   y_{c,l} = C_c h_{c,l} + D v_{c,l}

    Each scan has its own W, b, A and D, shared by all tokens, so any number of tokens is possible. The four outputs are
    added. It is `linzoo.ops.selective_scan` with channels as its sequence and tokens as its channels.

    Args:
        d_state: N.
        grid: Cells along each side for the selection.
    """

    def __init__(self, d_state: int = 16, grid: int = 7, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.d_state, self.grid = d_state, grid
        self.x_proj = nn.Parameter(torch.empty(4, 1 + 2 * d_state, grid * grid, **dd))
        self.dt_bias = nn.Parameter(torch.empty(4, **dd))
        self.A_log = nn.Parameter(torch.empty(4, d_state, **dd))
        self.D = nn.Parameter(torch.empty(4, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.uniform_(self.x_proj, -1 / self.grid, 1 / self.grid)
        init_step_bias(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, v):
        """``(B, H, W, C)`` to the sum of the four scans, ``(B, H, W, C)``."""
        B, H, W, C = v.shape
        v = v.permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
        cells = F.adaptive_avg_pool2d(v, self.grid).flatten(2)
        cells = cells[..., scan_order.cross(self.grid, self.grid, v.device).long()]  # (B, C, scan, cell)
        selection = torch.einsum("bckp,kop->bcko", cells, self.x_proj)  # (B, C, scan, 1 + 2 N)
        dt, B_c, C_c = selection.split([1, self.d_state, self.d_state], dim=-1)

        def for_tokens(x):  # (scan, ...) to (scan, tokens, ...)
            return x.unsqueeze(1).expand(-1, H * W, *x.shape[1:])

        y = selective_scan(
            v.view(B, C, 1, H * W),
            dt,
            for_tokens(-torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))),
            B_c,
            C_c,
            for_tokens(self.D),
            dt_weight=v.new_ones(1, 1, 1).expand(4, H * W, 1),
            dt_bias=for_tokens(self.dt_bias),
            merge=True,
        )
        return y.view(B, C, H, W).permute(0, 2, 3, 1)


class ChannelMixer(nn.Module):
    """Selective channel mixer: ``W_out (LN(ChannelScan(SiLU(DWConv(v)))) * SiLU(g))`` with ``[v, g] = W_in x``; v and g
    have `ratio` times the width."""

    def __init__(self, dim: int, d_state: int = 16, ratio: float = 1.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner = int(ratio * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, **dd)
        self.scan = ChannelScan(d_state, **dd)
        self.out_norm = nn.LayerNorm(inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x):
        v, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.out_norm(self.scan(F.silu(self.conv(v)))) * F.silu(gate))


class Block(nn.Module):
    """Block l of a stage: token mixers and a channel mixer, each after a LayerNorm of its weighted average.

    Args:
        l: Number of the block, from 1.
        dim: Width.
        token_mixers: Number of token mixers before the channel mixer.
        token_ratio, channel_ratio: Inner widths of the mixers over the block's.
        d_state: States per channel, of all mixers.
        averaging: Learn the averages.
        drop_path: Stochastic depth.
    """

    def __init__(
        self,
        l: int,
        dim: int,
        token_mixers: int,
        token_ratio: float,
        channel_ratio: float,
        d_state: int,
        averaging: bool,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        before = token_mixers * (l - 1) + 1  # token mixers' outputs so far, including the stage's input
        counts = range(before, before + token_mixers)
        self.token_averages = nn.ModuleList(WeightedAverage(count, l, averaging, **dd) for count in counts)
        self.token_norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6, **dd) for _ in counts)
        self.token_mixers = nn.ModuleList(TokenMixer(dim, token_ratio, d_state, **dd) for _ in counts)
        self.channel_average = WeightedAverage(before + token_mixers, l, averaging, **dd)
        self.channel_norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.channel_mixer = ChannelMixer(dim, d_state, channel_ratio, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, count, *outputs):
        """From outputs ``(B, H, W, C)`` of `count` token mixers and of the channel mixers so far, each list starting
        with the stage's input, to this block's outputs: those of its token mixers and its channel mixer."""
        tokens, channels = list(outputs[:count]), outputs[count:]
        for average, norm, mixer in zip(self.token_averages, self.token_norms, self.token_mixers, strict=True):
            tokens.append(self.drop_path(mixer(norm(average(tokens, channels)))))
        x = self.channel_average(tokens, channels)
        return *tokens[count:], self.drop_path(self.channel_mixer(self.channel_norm(x)))


class ViM2Stage(nn.Module):
    """Downsampling, blocks that all see each other's outputs, and a last weighted average as the stage's output."""

    def __init__(
        self, blocks: Sequence[Block], averaging: bool, downsample: nn.Module | None = None, device=None, dtype=None
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        tokens = sum(len(block.token_mixers) for block in blocks)
        self.average = WeightedAverage(tokens + 1, len(blocks) + 1, averaging, device=device, dtype=dtype)

    def forward(self, x):
        x = self.downsample(x)
        tokens, channels = [x], [x]
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                *y, z = checkpoint(block, len(tokens), *tokens, *channels)
            else:
                *y, z = block(len(tokens), *tokens, *channels)
            tokens, channels = [*tokens, *y], [*channels, z]
        return self.average(tokens, channels)


class ViM2(Pyramid):
    """ViM2 (arXiv 2403.19888, version 1).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dims: Channels of each stage.
        depths: Blocks of each stage, each with `token_mixers` token mixers and a channel mixer.
        token_mixers: Token mixers per block.
        ssm_ratio: Inner width of the token mixers over the block's.
        channel_ratios: For each stage, inner width of the channel mixers over the block's.
        d_state: States per channel, of both mixers.
        averaging: Learn the weighted averages; False for plain residuals.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (1, 1, 3, 1),
        token_mixers: int = 2,
        ssm_ratio: float = 2.0,
        channel_ratios: tuple[float, ...] = (2.0, 2.0, 2.0, 1.0),
        d_state: int = 16,
        averaging: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        self.stem = PatchEmbed(None, 4, in_chans, dims[0], nn.LayerNorm, output_fmt="NHWC", **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            settings = (dim, token_mixers, ssm_ratio, channel_ratios[i], d_state, averaging)
            blocks = [Block(l, *settings, rate, **dd) for l, rate in enumerate(drop_path[i], start=1)]
            downsample = PatchMerging(dims[i - 1], dim, **dd) if i else None
            stages.append(ViM2Stage(blocks, averaging, downsample, **dd))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


def _cfg(**kwargs):
    return imagenet_cfg(
        first_conv="stem.proj",
        classifier="head.fc",
        origin_url="https://github.com/MambaMixer/M2",
        paper_ids="arXiv:2403.19888",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in ("vim2_t", "vim2_s", "vim2_b")})


def _create_vim2(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        ViM2,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def vim2_t(pretrained=False, **kwargs):
    """ViM2-T."""
    return _create_vim2("vim2_t", pretrained, **kwargs)


@register_model
def vim2_s(pretrained=False, **kwargs):
    """ViM2-S."""
    return _create_vim2("vim2_s", pretrained, **dict(dict(depths=(1, 1, 9, 1)), **kwargs))


@register_model
def vim2_b(pretrained=False, **kwargs):
    """ViM2-B."""
    model_args = dict(dims=(128, 256, 512, 1024), depths=(1, 1, 9, 1))
    return _create_vim2("vim2_b", pretrained, **dict(model_args, **kwargs))
