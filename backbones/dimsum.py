"""DiMSUM.

Paper: DiMSUM: Diffusion Mamba - A Scalable and Unified Spatial-Frequency Method for Image Generation -
https://arxiv.org/abs/2411.04168

A denoiser of latents (B, 4, h, w), for a time t in [0, 1] and a class y. In each block, half of the channels pass a
Mamba along a raster order, half a Mamba over their Haar wavelets. Attention across both halves joins them::

    r = r + h;   u = RMS(r);   u = u + Fuse(Spatial(u_1), Frequency(u_2));   h = u + g MLP((1 + s) RMS(u) + b)

One transformer block, with the same weights each time, follows every fourth block. Tokens are (B, L, D), row by row.
The published model drops the last r. Each Mamba has a projection of the condition that nothing reads.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from linzoo.ops import scan_order

from .layers.checkpoint import MAMBA_NAMES, rename, reshape_as
from .layers.mamba import MambaMixer
from .layers.norm import RMSNorm
from .layers.script import refuse_script

__all__ = ["DiMSUM"]

FUSION_HEADS, SHARED_HEADS = 8, 16
FREQUENCIES = 128  # of the time embedding


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + s) x + b`` of tokens ``(B, L, D)`` by vectors ``(B, D)``."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def embed_time(t: Tensor) -> Tensor:
    """Times ``(B,)`` to ``(B, 256)``: cosines, then sines, of t at frequencies from 1 down to 1e-4."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    at = torch.arange(FREQUENCIES, device=t.device, dtype=t.dtype)
    angles = t[:, None] * torch.exp(-math.log(10000) * at / FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], 1)


def embed_positions(H: int, W: int, dim: int) -> Tensor:
    """Sines and cosines of the column, then of the row, ``(1, H W, dim)``."""
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    halves = []
    for at in torch.meshgrid(*(torch.arange(n, device="cpu") for n in (W, H)), indexing="xy"):
        angles = at.reshape(-1, 1) * frequency
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, 1).float()[None]


def haar_packet(device=None) -> Tensor:
    """Two levels of Haar's packet as a matrix ``(16, 16)`` of 1 and -1, from the pixels of a 4 x 4 patch to bands.

    Band 4 s_1 + s_2: s_1 of the first level, s_2 of the second; of each, 0 is low, 1 high along the column, 2 along the
    row, 3 along both. Over 4 it is orthonormal.
    """
    i = torch.arange(16, device=device)
    bands = torch.stack([i >> k & 1 for k in (3, 2, 1, 0)], 1)  # along the row, along the column, twice
    pixels = torch.stack([i >> k & 1 for k in (0, 2, 1, 3)], 1)  # the last bits of x and y, then the first
    return 1.0 - 2 * ((bands[:, None] * pixels).sum(2) % 2)


class Half(nn.Module):
    """``q + g Mamba((1 + s) q + b)`` along an order; tokens ``(B, L, C)``, condition ``(B, D)`` after its SiLU."""

    def __init__(self, dim: int, cond_dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.modulation = nn.Linear(cond_dim, 3 * dim, **dd)
        self.mixer = MambaMixer(dim, **dd)
        self.cond_proj = nn.Linear(cond_dim, 2 * dim, **dd).requires_grad_(False)  # nothing reads it

    def forward(self, q: Tensor, cond: Tensor, order: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(cond).chunk(3, 1)
        return torch.addcmul(q, gate.unsqueeze(1), self.mixer(modulate(q, shift, scale), order))


class FrequencyHalf(Half):
    """`Half` of the Haar packet of a map, over 4, and back.

    The bands' channels, band after band, are spread over the tokens of each 4 x 4 patch by their flat index k: token
    (p_1, p_2) has those with ``k % 16 = 4 p_1 + p_2``, which are C / 16 channels of every band.
    """

    def forward(self, q: Tensor, cond: Tensor, order: Tensor, width: int) -> Tensor:  # pyright: ignore
        packet = haar_packet(q.device).to(q.dtype)
        y = (packet / 16 @ self.cut(q, width)).flatten(3).unflatten(3, (-1, 16)).mT
        y = super().forward(self.join(y), cond, order)
        y = self.cut(y, width).mT.flatten(3).unflatten(3, (16, -1))
        return self.join(packet.t() @ y)

    @staticmethod
    def cut(tokens: Tensor, width: int) -> Tensor:
        """Tokens ``(B, H W, C)`` to patches ``(B, H / 4, W / 4, 16, C)``."""
        return tokens.unflatten(1, (-1, 4, width // 4, 4)).transpose(2, 3).flatten(3, 4)

    @staticmethod
    def join(patches: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return patches.unflatten(3, (4, 4)).transpose(2, 3).flatten(1, 4)


class CrossFusion(nn.Module):
    """Each half attends to the other: ``W [softmax(q_1 k_2) v_2 | softmax(q_2 k_1) v_1]``; halves ``(B, L, C)``."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.qkv1, self.qkv2 = (nn.Linear(dim, 3 * dim, **dd) for _ in range(2))
        self.proj = nn.Linear(2 * dim, 2 * dim, **dd)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        q1, k1, v1 = split_heads(self.qkv1(first), FUSION_HEADS)
        q2, k2, v2 = split_heads(self.qkv2(second), FUSION_HEADS)
        found = (F.scaled_dot_product_attention(*qkv) for qkv in ((q1, k2, v2), (q2, k1, v1)))
        return self.proj(torch.cat([y.transpose(1, 2).flatten(2) for y in found], 2))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Splits ``(B, L, 3 C)`` into queries, keys and values ``(B, heads, L, C / heads)``."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(nn.Module):
    """Softmax attention of tokens ``(B, L, D)``."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, **dd), nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*split_heads(self.qkv(x), SHARED_HEADS))
        return self.proj(y.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """``W_3 (GELU(a) b)``, ``[a | b] = W_12 u``, with four times the width inside."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 8 * dim, **dd), nn.Linear(4 * dim, dim, **dd)

    def forward(self, u: Tensor) -> Tensor:
        a, b = self.w12(u).chunk(2, 2)
        return self.w3(F.gelu(a, approximate="tanh") * b)


class SharedBlock(nn.Module):
    """A transformer block, modulated by the condition: ``h += g Attention(...);  h += g MLP(...)``."""

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = Attention(dim, **dd), GatedMlp(dim, **dd)
        self.modulation = nn.Linear(dim, 6 * dim, **dd)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.modulation(cond).chunk(6, 1)
        h = torch.addcmul(h, g1.unsqueeze(1), self.attn(modulate(self.norm(h), b1, s1)))
        return torch.addcmul(h, g2.unsqueeze(1), self.mlp(modulate(self.norm(h), b2, s2)))


class Block(nn.Module):
    """See the module's docstring; returns (h, r)."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim, **dd), RMSNorm(dim, **dd)
        self.spatial, self.frequency = Half(dim // 2, dim, **dd), FrequencyHalf(dim // 2, dim, **dd)
        self.fuse, self.mlp = CrossFusion(dim // 2, **dd), GatedMlp(dim, **dd)
        self.modulation = nn.Linear(dim, 3 * dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, h: Tensor, r: Tensor, cond: Tensor, orders: tuple[Tensor, Tensor], width: int
    ) -> tuple[Tensor, Tensor]:
        """h, r ``(B, L, D)``, the condition ``(B, D)``, orders ``(1, L)`` of the halves, the map's width."""
        r = r + self.drop_path(h)
        u = self.norm1(r)
        first, second = u.chunk(2, 2)
        u = u + self.fuse(self.spatial(first, cond, orders[0]), self.frequency(second, cond, orders[1], width))
        shift, scale, gate = self.modulation(cond).chunk(3, 1)
        return torch.addcmul(u, gate.unsqueeze(1), self.mlp(modulate(self.norm2(u), shift, scale))), r


class DiMSUM(nn.Module):
    """DiMSUM (arXiv 2411.04168): predicts the velocity from noise to a latent.

    Args:
        img_resolution: Side of the latents, or height and width. In tokens, both are multiples of 4, and the height is
            also a multiple of a quarter of the width.
        patch_size: Side p of a token.
        in_channels: Channels of the latents.
        hidden_size: Width D, a multiple of 32.
        depth: Blocks.
        num_classes: Classes; 1 for none.
        label_dropout: How often training takes "no class". If positive, the class table has a last row for it.
        drop_path_rate: Rate before the last block; the first block has none.
        use_final_norm: Output ``RMS(r + h)`` instead of h. No published model does.

    Raises:
        ValueError: the latents' size does not suit the wavelets or their windows; the width is not supported.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        img_resolution: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1024,
        depth: int = 16,
        num_classes: int = 1000,
        label_dropout: float = 0.15,
        drop_path_rate: float = 0.0,
        use_final_norm: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        sides = (img_resolution, img_resolution) if isinstance(img_resolution, int) else tuple(img_resolution)
        step = 4 * patch_size
        if len(sides) != 2 or any(side < step or side % step for side in sides) or sides[0] % (sides[1] // 4):
            raise ValueError(
                f"img_resolution: expected sides that are multiples of {step} (4 tokens of {patch_size}) and a height "
                f"that is one of a quarter of the width, got {img_resolution!r}"
            )
        if hidden_size < 32 or hidden_size % 32:
            raise ValueError(f"hidden_size: expected a multiple of 32, got {hidden_size}")
        self.img_resolution, self.patch_size, self.in_channels = sides, patch_size, in_channels
        self.in_chans = in_channels  # timm's name
        self.grid = (sides[0] // patch_size, sides[1] // patch_size)
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.num_features = self.head_hidden_size = hidden_size
        self.feature_info = [
            dict(num_chs=hidden_size, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)
        ]

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], hidden_size, **dd))
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size, **dd), nn.SiLU(), nn.Linear(hidden_size, hidden_size, **dd)
        )
        self.class_embed = nn.Embedding(num_classes + (label_dropout > 0), hidden_size, **dd)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(hidden_size, rate, **dd) for rate in [0.0, *rates[: depth - 1]])
        self.shared = SharedBlock(hidden_size, **dd)
        self.final_norm = RMSNorm(hidden_size, **dd) if use_final_norm else None
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size, **dd)
        self.head = nn.Linear(hidden_size, patch_size**2 * in_channels, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Fills the parameters; with `needs_reset` (after `to_empty`) also those that constructors fill."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for half in (block.spatial, block.frequency):
                with torch.no_grad():
                    half.mixer.out_proj.reset_parameters()
                    half.mixer.out_proj.weight.div_(len(self.blocks) ** 0.5)
        with torch.no_grad():
            self.pos_embed.copy_(embed_positions(*self.grid, self.num_features))
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)  # pyright: ignore[reportArgumentType]
        for layer in (self.class_embed, self.time_mlp[0], self.time_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation, self.head, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)

    @property
    def null_class(self) -> int | None:
        """The row of "no class", for guidance; None where the table has none."""
        return self.num_classes if self.label_dropout > 0 else None

    @property
    def dummy_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` for one latent, of zeros."""
        x = self.pos_embed.new_zeros(1, self.in_channels, *self.img_resolution)
        return x, x.new_zeros(1), x.new_zeros(1, dtype=torch.long)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rate decay."""
        return dict(stem=r"^(patch_embed|pos_embed|time_mlp|class_embed)", blocks=r"^blocks\.(\d+)")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that outputs the velocity."""
        return self.head

    def orders(self, device=None) -> tuple[list[Tensor], list[Tensor]]:
        """The orders ``(1, L)`` of the spatial halves of blocks 0 to 3, and of the frequency halves of 0 and 1."""
        H, W = self.grid
        rows, columns = scan_order.raster(H, W, device), scan_order.column(H, W, device)
        spatial = [rows, scan_order.reverse(rows), columns, scan_order.reverse(columns)]
        turned = scan_order.windowed(W, H, W // 4, device)
        windows = [scan_order.windowed(H, W, W // 4, device), turned % H * W + turned // H]
        return [order[None] for order in spatial], [order[None] for order in windows]

    def forward_features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` to the last block's h and r ``(B, L, D)``, and the condition ``(B, D)``."""
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.img_resolution):
            sides = ", ".join(map(str, (self.in_channels, *self.img_resolution)))
            raise ValueError(f"x: expected latents (B, {sides}), got {tuple(x.shape)}")
        if y is None:
            y = torch.full((len(x),), self.class_embed.num_embeddings - 1, device=x.device)
        elif y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(f"y: expected {len(x)} classes as integers, got {tuple(y.shape)} of {y.dtype}")
        embedded = embed_time(t.expand(len(x))).to(self.time_mlp[0].weight.dtype)
        cond = F.silu(self.time_mlp(embedded) + self.class_embed(y))
        h = self.patch_embed(x).flatten(2).mT + self.pos_embed
        r = torch.zeros_like(h)
        spatial, windows = self.orders(x.device)
        for i, block in enumerate(self.blocks):
            h, r = block(h, r, cond, (spatial[i % 4], windows[i % 2]), self.grid[1])
            if i % 4 == 3:
                h = self.shared(h, cond)
        return h, r, cond

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity for latents.

        Args:
            x: ``(B, in_channels, h, w)``.
            t: Times ``(B,)`` or one for all ``()``: 0 for noise, 1 for data.
            y: Classes ``(B,)``; None for "no class", the last row of the table.

        Returns:
            As `x`.

        Raises:
            ValueError: the latents have another size; classes are not one integer each.
        """
        h, r, cond = self.forward_features(x, t, y)
        h = h if self.final_norm is None else self.final_norm(r + h)
        h = self.head(modulate(self.norm(h), *self.modulation(cond).chunk(2, 1)))
        H, p = self.grid[0], self.patch_size
        return h.unflatten(2, (p, p, -1)).unflatten(1, (H, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# Published names and ours, in the order in which they are replaced.
_RENAMES = [
    (r"^x_embedder\.proj\.", "patch_embed."),
    (r"^t_embedder\.mlp\.", "time_mlp."),
    (r"^y_embedder\.embedding_table\.", "class_embed."),
    (r"^attn_block\.", "shared."),
    (r"^norm_f\.", "final_norm."),
    (r"^final_layer\.linear\.", "head."),
    (r"^final_layer\.", ""),
    (r"adaLN_modulation\.1\.", "modulation."),
    (r"\.norm\.", ".norm1."),
    (r"\.norm_2\.", ".norm2."),
    (r"^(blocks\.\d+)\.proj\.", r"\1.fuse."),
    (r"\.spatial_mamba\.", ".spatial."),
    (r"\.freq_mamba\.", ".frequency."),
    (r"\.mixer\.cond_proj\.", ".cond_proj."),
    *((rf"\.mixer\.{theirs.replace('.', chr(92) + '.')}$", f".mixer.{ours}") for theirs, ours in MAMBA_NAMES.items()),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: DiMSUM) -> dict[str, Tensor]:
    """Converts the authors' state dict to ours. From a training file it takes the averaged weights; positions of
    another size are resized."""
    for name in ("ema", "model", "state_dict"):
        if isinstance(state_dict.get(name), dict):
            state_dict = state_dict[name]  # pyright: ignore[reportAssignmentType]
            break
    found = dict(state_dict)
    if "x_embedder.proj.weight" in state_dict:
        computed = (".dwt.", ".idwt.")
        kept = {key: x for key, x in state_dict.items() if not any(name in key for name in computed)}
        found = reshape_as({rename(key, _RENAMES): x for key, x in kept.items()}, model)
    positions = found.get("pos_embed")
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(positions.shape[1])
        table = positions.float().mT.unflatten(2, (side, -1))
        resized = F.interpolate(table, model.grid, mode="bicubic", align_corners=False)
        found["pos_embed"] = resized.flatten(2).mT.to(positions.dtype)
    return found


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (4, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,) * 4,
        "std": (1.0,) * 4,
        "first_conv": (),
        "classifier": (),
        "paper_ids": "arXiv:2411.04168",
        "origin_url": "https://github.com/VinAIResearch/DiMSUM",
        "license": "bsd-3-clause",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in ("dimsum_b_2", "dimsum_l_2", "dimsum_l_2_v1", "dimsum_xl_2", "dimsum_l_4")}
)


def _create_dimsum(variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        DiMSUM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        kwargs_filter=("img_size", "in_chans"),
        **kwargs,
    )


@register_model
def dimsum_b_2(pretrained: bool = False, **kwargs) -> DiMSUM:
    """DiMSUM-B/2."""
    return _create_dimsum("dimsum_b_2", pretrained, **dict(dict(hidden_size=768, depth=12), **kwargs))


@register_model
def dimsum_l_2(pretrained: bool = False, **kwargs) -> DiMSUM:
    """DiMSUM-L/2, the published one."""
    return _create_dimsum("dimsum_l_2", pretrained, **kwargs)


@register_model
def dimsum_l_2_v1(pretrained: bool = False, **kwargs) -> DiMSUM:
    """DiMSUM-L/2 of 20 blocks."""
    return _create_dimsum("dimsum_l_2_v1", pretrained, **dict(dict(depth=20), **kwargs))


@register_model
def dimsum_xl_2(pretrained: bool = False, **kwargs) -> DiMSUM:
    """DiMSUM-XL/2."""
    return _create_dimsum("dimsum_xl_2", pretrained, **dict(dict(hidden_size=1152, depth=24), **kwargs))


@register_model
def dimsum_l_4(pretrained: bool = False, **kwargs) -> DiMSUM:
    """DiMSUM-L/4."""
    return _create_dimsum("dimsum_l_4", pretrained, **dict(dict(patch_size=4), **kwargs))
