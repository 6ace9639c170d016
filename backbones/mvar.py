"""M-VAR.

Paper: M-VAR: Decoupled Scale-wise Autoregressive Modeling for High-Quality Image Generation -
https://arxiv.org/abs/2411.10433

An image is K maps of codes, coarse to fine, with sides p_1 < ... < p_K. Each map is predicted at once, given the
earlier maps. A block mixes the tokens of a map by attention, then the tokens of all maps so far by a causal Mamba-2::

    x += g_1 Attention(LN(x));   x += g_2 Mamba2(LN(x));   x += g_3 MLP(LN(x))

each modulated by the class. Tokens are (B, L, D), L = p_1^2 + ... + p_K^2. The tokenizer is in `mvar_tokenizer.py`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, GELUTanh, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from linzoo.ops import ssd_state

from .layers.checkpoint import rename, unwrap_state_dict
from .layers.s6 import init_step_bias
from .layers.script import refuse_script
from .layers.vim_mixer import CausalConv

__all__ = ["MVAR"]

HEAD_DIM = 64
STATES = 64  # N of Mamba-2
MAX_SCALE = math.log(100)  # largest attention sharpness (logarithm)
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def widen(x: Tensor) -> Tensor:
    """Casts to float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Memory(NamedTuple):
    """The state of a Mamba-2: its convolution's last inputs ``(B, 3, C)`` and its state ``(B, heads, P, N)``."""

    inputs: Tensor
    state: Tensor


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060, section 7) with one group, for tokens ``(B, L, D)``::

    [z, x, B, C, dt] = W_in u;   [x, B, C] = SiLU(conv([x, B, C]));   dt = softplus(dt + bias)
    y = SSD(x, dt, -exp(A_log), B, C, D);   W_out (w RMS(y SiLU(z)))
    """

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.inner, self.heads = 2 * dim, 2 * dim // HEAD_DIM
        self.in_proj = nn.Linear(dim, 2 * self.inner + 2 * STATES + self.heads, bias=False, **dd)
        self.conv = CausalConv(self.inner + 2 * STATES, 1, **dd)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(self.heads, **dd)) for _ in range(3))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(self.inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_step_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)

    def forward(self, u: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Tokens, which follow those of `memory`, to the same shape; and the memory after them."""
        z, x, dt = self.in_proj(u).split([self.inner, self.inner + 2 * STATES, self.heads], 2)
        before = x.new_zeros(len(x), self.conv.weight.shape[2] - 1, x.shape[2]) if memory is None else memory.inputs
        x = torch.cat([before, x], 1)
        kept = x[:, -before.shape[1] :]
        x = self.conv(x.unsqueeze(2))[:, before.shape[1] :, 0]
        x, B, C = x.split([self.inner, STATES, STATES], 2)
        dt = F.softplus(widen(dt) + self.dt_bias)
        y, state = ssd_state(
            x.unflatten(2, (self.heads, HEAD_DIM)), dt, -widen(self.A_log).exp(), B.unsqueeze(2), C.unsqueeze(2),
            self.D, None if memory is None else memory.state, chunk_size=min(64, u.shape[1]),
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2) * F.silu(z))), Memory(kept, state)


class MapAttention(nn.Module):
    """Softmax attention among the tokens of one map.

    Args:
        dim: Channels, a multiple of 64.
        unit_queries: Scale queries and keys to length 1, then queries by a factor that each head learns, up to 100.
            Otherwise the scores are ``q k / 32``.
    """

    def __init__(self, dim: int, unit_queries: bool = True, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.q_bias, self.v_bias = (nn.Parameter(torch.empty(dim, **dd)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.empty(1, self.heads, 1, 1, **dd)) if unit_queries else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, math.log(4))

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Tokens ``(B, L, D)`` of maps with `lengths` tokens, to the same shape."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias.to(self.qkv.weight.dtype))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = 0.25 * HEAD_DIM**-0.5
        if self.log_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            q, scale = q * self.log_scale.clamp(max=MAX_SCALE).exp().to(q.dtype), 1.0
            k = k.to(v.dtype)
            q = q.to(v.dtype)
        maps = zip(*(part.split(tuple(lengths), 2) for part in (q, k, v)), strict=True)
        found = torch.cat([F.scaled_dot_product_attention(*one, scale=scale) for one in maps], 2)
        return self.proj(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """See the module's docstring; `modulation` gives the gates, scales and shifts of the three, in turn."""

    def __init__(self, dim: int, drop_path: float = 0.0, unit_queries: bool = True, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn, self.mamba = MapAttention(dim, unit_queries, **dd), Mamba2(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELUTanh, **dd)
        self.modulation = nn.Linear(dim, 9 * dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, cond: Tensor, lengths: Sequence[int], memory: Memory | None = None
    ) -> tuple[Tensor, Memory]:
        """Tokens ``(B, L, D)`` of maps with `lengths` tokens, which follow those of `memory`; and the next memory."""
        g1, g2, g3, s1, s2, s3, b1, b2, b3 = self.modulation(cond).unsqueeze(1).chunk(9, 2)
        x = x + self.drop_path(self.attn(torch.addcmul(b1, self.norm(x), 1 + s1), lengths) * g1)
        y, after = self.mamba(torch.addcmul(b2, self.norm(x), 1 + s2), memory)
        x = x + self.drop_path(y * g2)
        return x + self.drop_path(self.mlp(torch.addcmul(b3, self.norm(x), 1 + s3)) * g3), after


class MVAR(nn.Module):
    """M-VAR (arXiv 2411.10433): the codes of all maps of an image, each given the coarser maps and a class.

    Args:
        depth: Blocks; also the number of heads, and the width D over 64.
        patch_nums: Sides p_k of the maps.
        V: Number of codes.
        Cvae: Channels of a code.
        num_classes: Classes; the table has one more row for "no class".
        attn_l2_norm: See `MapAttention`; needed for published files that contain `scale_mul_1H11`.
        drop_path_rate: Of the last block; None for ``0.1 depth / 24``.
        gate_init: Initial scale of the first two gates' weights (`alng`).

    Raises:
        ValueError: the sides do not grow; a number is below 1.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        depth: int = 16,
        patch_nums: Sequence[int] = SIDES,
        V: int = 4096,
        Cvae: int = 32,
        num_classes: int = 1000,
        attn_l2_norm: bool = True,
        drop_path_rate: float | None = None,
        gate_init: float = 1e-3,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        sides = check_sides(patch_nums)
        for name, value in (("depth", depth), ("V", V), ("Cvae", Cvae), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 at least, got {value}")
        dim = HEAD_DIM * depth
        self.patch_nums, self.lengths, self.V, self.Cvae = sides, [side**2 for side in sides], V, Cvae
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, dim, dim
        self.feature_info = [dict(num_chs=dim, reduction=1, module=f"blocks.{i}") for i in range(depth)]
        self.gate_init = gate_init

        self.class_embed = nn.Embedding(num_classes + 1, dim, **dd)
        self.pos_start = nn.Parameter(torch.empty(1, self.lengths[0], dim, **dd))
        self.word_embed = nn.Linear(Cvae, dim, **dd)
        self.level_embed = nn.Embedding(len(sides), dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, sum(self.lengths), dim, **dd))
        rate = 0.1 * depth / 24 if drop_path_rate is None else drop_path_rate
        rates = torch.linspace(0, rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, r, attn_l2_norm, **dd) for r in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim, **dd)
        self.head = nn.Linear(dim, V, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        std = (1 / (3 * self.num_features)) ** 0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, CausalConv):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_embed):
            trunc_normal_(table, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.modulation.weight.mul_(0.5)
            for block in self.blocks:
                block.attn.proj.weight.div_((2 * len(self.blocks)) ** 0.5)
                block.mlp.fc2.weight.div_((2 * len(self.blocks)) ** 0.5)
                block.modulation.weight[: 2 * self.num_features].mul_(self.gate_init)
                block.modulation.weight[2 * self.num_features :].mul_(0.5)

    @property
    def null_class(self) -> int:
        """The row of "no class", for guidance."""
        return self.num_classes

    @property
    def dummy_inputs(self) -> tuple[Tensor, Tensor]:
        """Arguments of `forward` for one image, of zeros."""
        inputs = self.pos_embed.new_zeros(1, sum(self.lengths[1:]), self.Cvae)
        return inputs.new_zeros(1, dtype=torch.long), inputs

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of positions and levels, and the attention's sharpness."""
        sharp = {name for name, _ in self.named_parameters() if name.endswith("log_scale")}
        return {"pos_start", "pos_embed", "level_embed.weight"} | sharp

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rate decay."""
        return dict(stem=r"^(class_embed|pos_|word_embed|level_embed)", blocks=r"^blocks\.(\d+)")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that outputs the logits."""
        return self.head

    def embed(self, y: Tensor, inputs: Tensor | None, first: int = 0, count: int | None = None) -> Tensor:
        """The tokens of `count` maps (None for all), starting with map `first`.

        Args:
            y: Classes ``(B,)``.
            inputs: The sums so far, resized to each map ``(B, L, Cvae)``, without the first map, which has none.
        """
        last = len(self.lengths) if count is None else first + count
        start, stop = sum(self.lengths[:first]), sum(self.lengths[:last])
        parts = []
        if first == 0:
            parts.append(self.class_embed(y).unsqueeze(1) + self.pos_start)
        if inputs is not None:
            parts.append(self.word_embed(inputs.to(self.word_embed.weight.dtype)))
        rows = zip(self.level_embed.weight[first:last], self.lengths[first:last], strict=True)
        level = torch.cat([row.expand(length, -1) for row, length in rows])
        return torch.cat(parts, 1) + level + self.pos_embed[:, start:stop]

    def decide(self, x: Tensor, y: Tensor) -> Tensor:
        """The last block's tokens to logits ``(B, L, V)`` in float32 or wider."""
        scale, shift = self.modulation(F.silu(self.class_embed(y))).unsqueeze(1).chunk(2, 2)
        return widen(self.head(torch.addcmul(shift, self.norm(x), 1 + scale)))

    def forward(self, y: Tensor, inputs: Tensor) -> Tensor:
        """Teacher forcing: the logits of all maps, given the true sums.

        Args:
            y: Classes ``(B,)``; `null_class` for none.
            inputs: ``(B, L - p_1^2, Cvae)``, the tokenizer's `to_inputs`.

        Returns:
            ``(B, L, V)``, float32 or wider.

        Raises:
            ValueError: the inputs have another shape.
        """
        expected = (len(y), sum(self.lengths[1:]), self.Cvae)
        if tuple(inputs.shape) != expected:
            raise ValueError(f"inputs: expected {expected}, got {tuple(inputs.shape)}")
        x, cond = self.embed(y, inputs), F.silu(self.class_embed(y))
        for block in self.blocks:
            x, _ = block(x, cond, self.lengths)
        return self.decide(x, y)

    def step(
        self, y: Tensor, inputs: Tensor | None, k: int, memories: list[Memory] | None = None
    ) -> tuple[Tensor, list[Memory]]:
        """The logits of only map k, given the blocks' memories of the earlier maps.

        Args:
            y: Classes ``(B,)``.
            inputs: ``(B, p_k^2, Cvae)``, the sum so far at the size of the map; None for the first.
            k: Which map, from 0.
            memories: Those that the step of the previous map returned; None for the first.

        Returns:
            ``(B, p_k^2, V)`` in float32 or wider, and the memories for the next step, which do not grow.
        """
        x, cond, after = self.embed(y, inputs, k, 1), F.silu(self.class_embed(y)), []
        for block, memory in zip(self.blocks, memories or itertools.repeat(None)):  # noqa: B905
            x, memory = block(x, cond, self.lengths[k : k + 1], memory)
            after.append(memory)
        return self.decide(x, y), after


def check_sides(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """The sides of the maps; ValueError if they do not grow."""
    sides = tuple(patch_nums)
    if not sides or sides[0] < 1 or any(a >= b for a, b in itertools.pairwise(sides)):
        raise ValueError(f"patch_nums: expected sides that grow from 1 at least, got {sides}")
    return sides


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^pos_1LC$", "pos_embed"),
    (r"^class_emb\.", "class_embed."),
    (r"^lvl_embed\.", "level_embed."),
    (r"^head_nm\.ada_lin\.1\.", "modulation."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"\.attn\.mat_qkv\.", ".attn.qkv."),
    (r"\.scale_mul_1H11$", ".log_scale"),
    (r"\.mamba\.conv1d\.", ".mamba.conv."),
    (r"\.ffn\.", ".mlp."),
]
_COMPUTED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "attn.patch_nums")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: MVAR) -> dict[str, Tensor]:
    """Converts the authors' state dict to ours, without the values that are computed here."""
    state_dict, out = unwrap_state_dict(state_dict), {}
    if "pos_1LC" not in state_dict:
        return state_dict
    for key, x in state_dict.items():
        if not key.endswith(_COMPUTED):
            key = rename(key, _RENAMES)
            x = x.squeeze(1).unsqueeze(0) if key.endswith("conv.weight") and x.shape[1] == 1 else x
            out[key] = x.unsqueeze(0) if key.endswith("conv.bias") and x.dim() == 1 else x
    return out


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": None,
        "crop_pct": 256 / 288,
        "interpolation": "lanczos",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "first_conv": (),
        "classifier": (),
        "paper_ids": "arXiv:2411.10433",
        "origin_url": "https://github.com/OliverRensu/MVAR",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"mvar_d{depth}": _cfg() for depth in (12, 16, 20, 24, 30, 32)})


def _create_mvar(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        MVAR,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("img_size", "in_chans"),
        **kwargs,
    )


@register_model
def mvar_d12(pretrained: bool = False, **kwargs) -> MVAR:
    """M-VAR with 12 blocks."""
    return _create_mvar("mvar_d12", pretrained, **dict(dict(depth=12), **kwargs))


@register_model
def mvar_d16(pretrained: bool = False, **kwargs) -> MVAR:
    """M-VAR-d16; the published weights need `attn_l2_norm=False`."""
    return _create_mvar("mvar_d16", pretrained, **dict(dict(depth=16), **kwargs))


@register_model
def mvar_d20(pretrained: bool = False, **kwargs) -> MVAR:
    """M-VAR-d20; the published weights need `attn_l2_norm=False`."""
    return _create_mvar("mvar_d20", pretrained, **dict(dict(depth=20), **kwargs))


@register_model
def mvar_d24(pretrained: bool = False, **kwargs) -> MVAR:
    """M-VAR-d24."""
    return _create_mvar("mvar_d24", pretrained, **dict(dict(depth=24, gate_init=1e-4), **kwargs))


@register_model
def mvar_d30(pretrained: bool = False, **kwargs) -> MVAR:
    """M-VAR with 30 blocks."""
    return _create_mvar("mvar_d30", pretrained, **dict(dict(depth=30, gate_init=1e-5), **kwargs))


@register_model
def mvar_d32(pretrained: bool = False, **kwargs) -> MVAR:
    """M-VAR-d32."""
    return _create_mvar("mvar_d32", pretrained, **dict(dict(depth=32, gate_init=1e-5), **kwargs))
