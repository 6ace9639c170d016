"""TSM2, the time-series model of MambaMixer. UNVERIFIED: no code was published, and nothing shows that this is theirs.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection (version 1)
- https://arxiv.org/abs/2403.19888

Each variate of a series is cut into patches. Blocks mix the patches of a variate by a selective scan through time, then
the variates at a patch by two scans, there and back. Each mixer reads a learned average of the outputs of all earlier
mixers, normalised over time and features together. The model card lists what the paper leaves open.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .layers import S6, CausalConv, WeightedAverage

__all__ = ["TSM2"]


@register_notrace_module  # FX cannot trace scan orders, which depend on the number of tokens
class SelectiveMixer(nn.Module):
    """``W_out (sum over directions of SSM(SiLU(conv(v))) * SiLU(g))`` with ``[v, g] = W_in x`` on ``(B, L, C)``.

    Step size, B and C are linear in the block's input x, as in the paper, not in the output of the convolution.

    Args:
        dim: Channels C.
        directions: 1 to scan forwards, 2 for both ways; each has its own parameters, but they share one gate.
        expand: Inner width over C.
        d_state: N, states per channel.
        taps: Width of the causal convolution.
    """

    def __init__(
        self, dim: int, directions: int, expand: int = 2, d_state: int = 16, taps: int = 4, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = CausalConv(inner, directions, taps, **dd)
        self.s6 = S6(inner, directions, d_state, math.ceil(dim / 16), selects_from=dim, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        v, gate = self.in_proj(x).chunk(2, dim=-1)
        groups = self.s6.groups
        forth = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        order = torch.stack([forth, forth.flip(0)][:groups])
        u = self.conv(v.unsqueeze(2).expand(-1, -1, groups, -1), order)
        selection = F.linear(x, self.s6.x_proj.flatten(0, 1)).unflatten(-1, (groups, -1))
        return self.out_proj(self.s6.scan(u, selection, order, merge=True) * F.silu(gate))


class Block(nn.Module):
    """Block l, from 1: a time mixer and a variate mixer, each after a norm of its average of earlier outputs."""

    def __init__(
        self, l: int, patches: int, dim: int, expand: int, d_state: int, drop_rate: float, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.time_average = WeightedAverage(l, l, True, **dd)
        self.time_norm = nn.LayerNorm((patches, dim), **dd)
        self.time_mixer = SelectiveMixer(dim, 1, expand, d_state, **dd)
        self.variate_average = WeightedAverage(l + 1, l, True, **dd)
        self.variate_norm = nn.LayerNorm((patches, dim), **dd)
        self.variate_mixer = SelectiveMixer(dim, 2, expand, d_state, **dd)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, times: list[Tensor], variates: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs ``(B, M, P, C)`` of earlier mixers, each list starting with the input, to this block's outputs."""
        x = self.time_norm(self.time_average(times, variates))
        time = self.drop(self.time_mixer(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        x = self.variate_norm(self.variate_average([*times, time], variates)).transpose(1, 2)
        variate = self.variate_mixer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)
        return time, self.drop(variate)


class TSM2(nn.Module):
    """TSM2 (arXiv 2403.19888, version 1), unverified.

    Args:
        context: Input steps T.
        horizon: Forecast steps H.
        patch_size, stride: Steps in a patch, and from one patch to the next.
        dim: Width C.
        depth: Blocks.
        expand, d_state: Of the mixers.
        static_dim: Constant numbers given for each variate; 0 for none.
        future: Steps and numbers of the known future inputs of each variate; None for none.
        drop_rate: Dropout after the embedding and the mixers.

    Raises:
        ValueError: a size is not positive, or a patch is longer than the context.
    """

    def __init__(
        self,
        context: int = 512,
        horizon: int = 96,
        patch_size: int = 16,
        stride: int = 8,
        dim: int = 32,
        depth: int = 2,
        expand: int = 2,
        d_state: int = 16,
        static_dim: int = 0,
        future: tuple[int, int] | None = None,
        drop_rate: float = 0.3,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        sizes = dict(context=context, horizon=horizon, patch_size=patch_size, stride=stride, dim=dim, depth=depth)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected a positive number, got {size!r}")
        if patch_size > context:
            raise ValueError(f"patch_size: expected at most the context of {context} steps, got {patch_size}")
        self.context, self.horizon, self.num_classes = context, horizon, 0
        self.patch_size, self.stride, self.static_dim = patch_size, stride, static_dim
        self.future = tuple(future) if future else None
        length = context * (1 + bool(future) + bool(static_dim))
        patches = (length - patch_size) // stride + 1
        if future:
            features = math.prod(future)
            self.future_mixer = SelectiveMixer(features, 2, expand, d_state, **dd)
            self.future_proj = nn.Linear(features, context, **dd)
        self.static_proj = nn.Linear(static_dim, context, **dd) if static_dim else None
        self.embed = nn.Linear(patch_size, dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(patches, dim, **dd))
        self.drop = nn.Dropout(drop_rate)
        settings = (patches, dim, expand, d_state, drop_rate)
        self.blocks = nn.ModuleList(Block(l, *settings, **dd) for l in range(1, depth + 1))
        self.average = WeightedAverage(depth + 1, depth + 1, True, **dd)
        self.norm = nn.LayerNorm((patches, dim), **dd)
        self.head = nn.Linear(patches * dim, horizon, **dd)
        trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions."""
        return {"pos_embed"}

    def forward(self, x: Tensor, static: Tensor | None = None, future: Tensor | None = None) -> Tensor:
        """Series ``(B, M, T)`` of M variates to their continuation, ``(B, M, H)``.

        Each variate is normalised by its own mean and deviation over the context; the forecast is scaled back.

        Args:
            x: The series so far.
            static: ``(B, M, static_dim)``.
            future: ``(B, M, *future)``.

        Raises:
            ValueError: a shape does not fit.
        """
        _expect("x", x, "B, M, T", (self.context,))
        _expect("static", static, "B, M, C", (self.static_dim,) if self.static_dim else None)
        _expect("future", future, "B, M, T, C", self.future)
        mean = x.mean(-1, keepdim=True)
        deviation = x.std(-1, correction=0, keepdim=True) + 1e-5
        parts = [(x - mean) / deviation]
        if future is not None:
            parts.append(self.future_proj(self.future_mixer(future.flatten(2))))
        if static is not None:
            parts.append(self.static_proj(static))
        patches = torch.cat(parts, -1).unfold(-1, self.patch_size, self.stride)  # (B, M, P, patch_size)
        h = self.drop(self.embed(patches) + self.pos_embed)
        times, variates = [h], [h]
        for block in self.blocks:
            time, variate = block(times, variates)
            times, variates = [*times, time], [*variates, variate]
        y = self.head(self.norm(self.average(times, variates)).flatten(2))
        return y * deviation + mean


def _expect(name: str, x: Tensor | None, axes: str, sizes: tuple[int, ...] | None) -> None:
    """ValueError if `x` does not end with `sizes` after two axes, or is given but not expected."""
    if x is None and sizes is None:
        return
    if x is None or sizes is None or x.dim() != 2 + len(sizes) or tuple(x.shape[2:]) != tuple(sizes):
        expected = "None" if sizes is None else f"({axes}) that ends with {', '.join(map(str, sizes))}"
        raise ValueError(f"{name}: expected {expected}, got {None if x is None else tuple(x.shape)}")


def _cfg(**kwargs):
    return {"num_classes": 0, "input_size": (7, 1, 512), "paper_ids": "arXiv:2403.19888", **kwargs}


default_cfgs = generate_default_cfgs({"tsm2.untrained": _cfg()})


@register_model
def tsm2(pretrained: bool = False, **kwargs) -> TSM2:
    """TSM2 with the sizes of a replication: 512 steps to 96, two blocks of width 32."""
    filtered = ("num_classes", "global_pool", "in_chans", "img_size")
    return build_model_with_cfg(TSM2, "tsm2", pretrained, kwargs_filter=filtered, **kwargs)
