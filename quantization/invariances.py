"""Which changes of a model's weights leave its outputs unchanged, as data.

An `Axis` is a set of channels inside a model, with every parameter that has an axis for them. Its channels may be
scaled (weights that write them are divided by s, weights that read them multiplied), rotated (writers and readers by
one orthogonal matrix) or permuted, as far as the layers between commute with that. `linzoo.quantization.transforms`
does it.

Sources of what commutes with what: MambaQuant (arXiv 2501.13484, table of the transforms R1, R2, R5, S1 to S7 there),
Quamba2 (arXiv 2503.22879, reordering of heads and channels), RepQ-ViT (arXiv 2212.08254, norms).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from timm.layers import Attention as ViTAttention
from timm.layers import Mlp
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn

from linzoo.backbones import efficientvmamba, groupmamba, localmamba, mambavision, plain, spatialmamba, vmamba, vssd
from linzoo.backbones.layers import NCSSD, S6, SS2D, ChannelMix, RWKVBlock, SpatialMix, VimBlock, VimMixer
from linzoo.backbones.layers.mlla import MLLABlock
from linzoo.backbones.vim import Vim

__all__ = ["Axis", "Slot", "invariances"]


class Slot(NamedTuple):
    """Where an axis lies in a parameter.

    `dim` is the parameter's axis; its indices from `start` on are the channels. A scale s multiplies them by
    ``s^power``: `power` is 1 for parameters that read the channels, -1 for those that write them, 0 for those that only
    take part in a permutation.
    """

    name: str
    dim: int
    power: float
    start: int = 0


@dataclass(frozen=True)
class Axis:
    """Channels that may be transformed.

    Attributes:
        name: Name of the module, and of the channels in it.
        size: Number of channels n.
        slots: Every parameter that has them.
        moves: The transforms they allow, from 'scale', 'rotate' and 'permute'.
        grouped: Axis 0 of every slot counts groups whose channels move separately: scales are ``(G, n)``, rotations
            ``(G, n, n)``.
        blocks: Heads; channels stay in their head.
        tap: The tensor that shows the channels, a name of `linzoo.quantization.taps`; None if there is none.
        online: The module whose input is transformed at run time, because no weight writes it; None for none.
        norms: Norms that read the channels, each with the linear map after it. Before a rotation their gains must be
            folded into that map.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    moves: frozenset[str]
    grouped: bool = False
    blocks: int = 1
    tap: str | None = None
    online: str | None = None
    norms: tuple[tuple[str, str], ...] = ()


SCALE, PERMUTE = frozenset({"scale"}), frozenset({"permute"})


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels > 1


def _along(names: str, dim: int = 0, power: float = 0, start: int = 0) -> tuple[Slot, ...]:
    """Slots of parameters that are treated alike."""
    return tuple(Slot(name, dim, power, start) for name in names.split())


def _norm(name: str, power: float = -1, dim: int = 0) -> tuple[Slot, ...]:
    return _along(f"{name}.weight {name}.bias", dim, power)


def _norm_to_linear(name: str, size: int) -> Axis:
    """From the norm before `out_proj` to `out_proj`; a gate between them multiplies each channel separately."""
    slots = (*_norm(f"{name}.out_norm"), Slot(f"{name}.out_proj.weight", 1, 1))
    return Axis(f"{name}.out", size, slots, SCALE, tap=f"{name}.out_proj")


def _online(name: str, size: int) -> Axis:
    """The input of `out_proj`, transformed at run time."""
    moves = frozenset({"scale", "rotate"})
    slots = (Slot(f"{name}.out_proj.weight", 1, 1),)
    return Axis(f"{name}.online", size, slots, moves, tap=f"{name}.out_proj", online=f"{name}.out_proj")


def _to_conv(name: str, conv: str, size: int, start: int = 0, dim: int = 0, tap: bool = True) -> Axis:
    """From rows of `in_proj` to the depthwise convolution that reads them."""
    slots = (Slot(f"{name}.in_proj.weight", 0, -1, start), Slot(f"{name}.{conv}.weight", dim, 1))
    return Axis(f"{name}.{conv}", size, slots, SCALE, tap=f"{name}.{conv}" if tap else None)


def _s6_channels(name: str) -> tuple[Slot, ...]:
    """The channels that a scan keeps separate."""
    vectors = _along(f"{name}.s6.dt_weight {name}.s6.dt_bias {name}.s6.A_log {name}.s6.D", 1)
    return (Slot(f"{name}.s6.x_proj", 2, 0), *vectors)


def s6(name: str, module: S6) -> Iterator[Axis]:
    """The step size's narrow vector r (R5, S5), and the states: B writes, C reads them, A keeps them separate (S4).

    Declared by mixers that use `S6` unchanged; some add to its B or C, as PlainMamba does.
    """
    R, N = module.dt_rank, module.d_state
    step = (Slot(f"{name}.x_proj", 1, -1), Slot(f"{name}.dt_weight", 2, 1))
    yield Axis(f"{name}.step", R, step, frozenset({"scale", "rotate", "permute"}), grouped=True, tap=f"{name}.step")
    state = (Slot(f"{name}.x_proj", 1, -1, R), Slot(f"{name}.x_proj", 1, 1, R + N), Slot(f"{name}.A_log", 2, 0))
    yield Axis(f"{name}.state", N, state, SCALE | PERMUTE, grouped=True)


def ss2d(name: str, module: nn.Module) -> Iterator[Axis]:
    """Mixer of VMamba and its relatives: the convolution (S7), the norm and gate (S2), the scan's channels."""
    size = module.s6.dim
    yield from s6(f"{name}.s6", module.s6)
    yield _to_conv(name, "conv", size)
    yield _norm_to_linear(name, size)
    yield _online(name, size)
    slots = (Slot(f"{name}.in_proj.weight", 0, 0), *_along(f"{name}.conv.weight"), *_s6_channels(name))
    slots += (*_norm(f"{name}.out_norm", 0), Slot(f"{name}.out_proj.weight", 1, 0))
    if module.conv.bias is not None:
        slots += _along(f"{name}.conv.bias")
    if module.in_proj.out_features == 2 * size:
        slots += (Slot(f"{name}.in_proj.weight", 0, 0, size),)
    if isinstance(module, localmamba.LocalSS2D):
        slots += (*_norm(f"{name}.attn.norm", 0), Slot(f"{name}.attn.fc1.weight", 1, 0))
        slots += _along(f"{name}.attn.fc2.weight {name}.attn.fc2.bias")
    if isinstance(module, spatialmamba.StructureAwareSSM):
        slots += _along(f"{name}.fusion.kernels", 1)
    yield Axis(f"{name}.channels", size, slots, PERMUTE)


def vim_mixer(name: str, module: VimMixer) -> Iterator[Axis]:
    """Vim's mixer: it has no norm before `out_proj`, so the input there is transformed at run time (R2, S2)."""
    size = module.s6.dim
    yield from s6(f"{name}.s6", module.s6)
    yield _to_conv(name, "conv", size, dim=1)
    yield _online(name, size)
    slots = (Slot(f"{name}.in_proj.weight", 0, 0), Slot(f"{name}.in_proj.weight", 0, 0, size), *_s6_channels(name))
    slots += (*_along(f"{name}.conv.weight {name}.conv.bias", 1), Slot(f"{name}.out_proj.weight", 1, 0))
    yield Axis(f"{name}.channels", size, slots, PERMUTE)


def mambavision_mixer(name: str, module: mambavision.MambaVisionMixer) -> Iterator[Axis]:
    """MambaVision's mixer. Its convolutions read (B, C, L), which no tap shows."""
    half = module.s6.dim
    yield from s6(f"{name}.s6", module.s6)
    yield _to_conv(name, "conv_x", half, tap=False)
    yield _to_conv(name, "conv_z", half, half, tap=False)
    yield _online(name, 2 * half)
    slots = (Slot(f"{name}.in_proj.weight", 0, 0), *_along(f"{name}.conv_x.weight"), *_s6_channels(name))
    slots += (Slot(f"{name}.out_proj.weight", 1, 0),)
    if module.importance is not None:
        slots += (Slot(f"{name}.importance.weight", 1, 0),)
    yield Axis(f"{name}.channels", half, slots, PERMUTE)
    slots = (Slot(f"{name}.in_proj.weight", 0, 0, half), *_along(f"{name}.conv_z.weight"))
    yield Axis(f"{name}.beside", half, (*slots, Slot(f"{name}.out_proj.weight", 1, 0, half)), PERMUTE)


def nc_ssd(name: str, module: NCSSD) -> Iterator[Axis]:
    """VSSD's mixer: channels stay in their heads; the states of B and C move together after their convolution."""
    inner, mixed, _ = module.sizes
    states = module.split[1]
    yield _to_conv(name, "conv", mixed, inner)
    out = (*_norm(f"{name}.norm"), Slot(f"{name}.out_proj.weight", 1, 1))
    yield Axis(f"{name}.out", inner, out, SCALE, tap=f"{name}.out_proj")
    yield _online(name, inner)
    conv = f"{name}.conv.weight {name}.conv.bias"
    slots = (*_along(f"{name}.in_proj.weight"), *_along(f"{name}.in_proj.weight", start=inner), *_along(conv))
    slots += (*_norm(f"{name}.norm", 0), Slot(f"{name}.out_proj.weight", 1, 0))
    yield Axis(f"{name}.channels", inner, slots, PERMUTE, blocks=module.num_heads)
    slots = ()
    for start in (inner, inner + states):
        slots += (*_along(f"{name}.in_proj.weight", start=inner + start), *_along(conv, start=start))
    yield Axis(f"{name}.state", states, slots, PERMUTE)


def group_scan(name: str, module: groupmamba.GatedGroupScan) -> Iterator[Axis]:
    """GroupMamba's mixer: from each group's norm through the gate to its `out_proj`."""
    yield from s6(f"{name}.s6", module.s6)
    slots = (*_norm(f"{name}.out_norm", dim=1), Slot(f"{name}.out_proj.weight", 2, 1))
    yield Axis(f"{name}.out", module.s6.dim, slots, SCALE, grouped=True, tap=f"{name}.out_proj")


def spatial_mix(name: str, module: SpatialMix) -> Iterator[Axis]:
    """RWKV's token mixer: BiWKV is linear in the values and keeps channels separate; the receptance multiplies each."""
    size = module.value.out_features
    value, output = Slot(f"{name}.value.weight", 0, -1), Slot(f"{name}.output.weight", 1, 1)
    slots = (value, output)
    normed = isinstance(module.out_norm, nn.LayerNorm)
    if normed:
        yield Axis(f"{name}.out", size, (*_norm(f"{name}.out_norm"), output), SCALE, tap=f"{name}.output")
        slots += _norm(f"{name}.out_norm", 0)
    else:
        yield Axis(f"{name}.out", size, slots, SCALE, tap=f"{name}.output")
    slots += _along(f"{name}.key.weight {name}.receptance.weight")
    yield Axis(f"{name}.channels", size, (*slots, *_along(f"{name}.decay {name}.bonus", 1)), PERMUTE)


def channel_mix(name: str, module: ChannelMix) -> Iterator[Axis]:
    """RWKV's channel mixer: the square of a ReLU grows with the square of a scale."""
    size = module.key.out_features
    normed = isinstance(module.hidden_norm, nn.LayerNorm)
    key, value = Slot(f"{name}.key.weight", 0, 0 if normed else -0.5), Slot(f"{name}.value.weight", 1, 1)
    slots = (key, value, *(_norm(f"{name}.hidden_norm") if normed else ()))
    yield Axis(f"{name}.hidden", size, slots, SCALE | PERMUTE, tap=f"{name}.value")


def mlp(name: str, module: nn.Module) -> Iterator[Axis]:
    """The hidden channels of an MLP; a depthwise convolution after `fc1` reads them before the activation."""
    size = module.fc1.out_features
    writes = tuple(_along(f"{name}.fc1.weight") + (_along(f"{name}.fc1.bias") if module.fc1.bias is not None else ()))
    slots = (*writes, Slot(f"{name}.fc2.weight", 1, 0))
    if isinstance(module, groupmamba.DepthwiseMlp):
        writes = tuple(slot._replace(power=-1) for slot in writes)
        yield Axis(f"{name}.conv", size, (*writes, Slot(f"{name}.conv.weight", 0, 1)), SCALE, tap=f"{name}.conv")
        slots += _along(f"{name}.conv.weight {name}.conv.bias")
    yield Axis(f"{name}.hidden", size, slots, PERMUTE)


def attention(name: str, module: nn.Module) -> Iterator[Axis]:
    """Softmax attention: linear in the values, and a product of query and key, head by head."""
    if any(not isinstance(getattr(module, part, None), nn.Identity | None) for part in ("q_norm", "k_norm", "norm")):
        return
    size = module.proj.in_features
    parts = [f"{name}.qkv.weight", *([f"{name}.qkv.bias"] if module.qkv.bias is not None else [])]
    query, key, value = (
        tuple(Slot(part, 0, power, i * size) for part in parts) for i, power in enumerate((-1.0, 1.0, -1.0))
    )
    heads = dict(moves=SCALE | PERMUTE | {"rotate"}, blocks=module.num_heads)
    yield Axis(f"{name}.value", size, (*value, Slot(f"{name}.proj.weight", 1, 1)), tap=f"{name}.proj", **heads)
    yield Axis(f"{name}.query", size, (*query, *key), **heads)


def vim(name: str, module: Vim) -> Iterator[Axis]:
    """Vim's residual stream (R1): an RMS norm without gain commutes with rotations."""
    if not isinstance(module.head, nn.Linear) or module.global_pool not in ("token", "avg"):
        return
    blocks = [f"blocks.{i}" for i in range(len(module.blocks))]
    writes = _along("patch_embed.weight patch_embed.bias", 0, -1) + _along("cls_token pos_embed", 2, -1)
    slots = (*writes, Slot("head.weight", 1, 1))
    for block in blocks:
        slots += (Slot(f"{block}.mixer.in_proj.weight", 1, 1), Slot(f"{block}.mixer.out_proj.weight", 0, -1))
    norms = (*((f"{block}.norm", f"{block}.mixer.in_proj") for block in blocks), ("norm", "head"))
    moves, tap = PERMUTE | {"rotate"}, f"{blocks[-1]}.mixer.in_proj"
    yield Axis("stream", module.num_features, slots, moves, tap=tap, norms=norms)


# What each kind of module allows. Only exactly these classes count, since a derived class may compute something else.
MODULES: dict[type, Callable[[str, Any], Iterator[Axis]]] = {
    SS2D: ss2d,
    efficientvmamba.ES2D: ss2d,
    localmamba.LocalSS2D: ss2d,
    spatialmamba.StructureAwareSSM: ss2d,
    VimMixer: vim_mixer,
    mambavision.MambaVisionMixer: mambavision_mixer,
    NCSSD: nc_ssd,
    groupmamba.GatedGroupScan: group_scan,
    SpatialMix: spatial_mix,
    ChannelMix: channel_mix,
    Mlp: mlp,
    groupmamba.DepthwiseMlp: mlp,
    vssd.Attention: attention,
    ViTAttention: attention,
    Vim: vim,
}
# The norms of blocks, and for each the parts that are its only readers (S1).
NORMS: dict[type, dict[str, tuple[str, ...]]] = {
    VimBlock: {"norm": ("mixer",)},
    vmamba.Block: {"norm1": ("mixer",), "norm2": ("mlp",)},
    localmamba.VSSBlock: {"norm": ("mixer",)},
    efficientvmamba.EVSSBlock: {"norm": ("mixer", "conv_branch")},
    groupmamba.Block: {"norm": ("mlp",)},
    mambavision.Block: {"norm1": ("mixer",), "norm2": ("mlp",)},
    MLLABlock: {"norm1": ("mixer",), "norm2": ("mlp",)},
    plain.Block: {"norm1": ("mixer.mixer",), "norm2": ("mlp",)},
    RWKVBlock: {"norm1": ("mixer",), "norm2": ("mlp",)},
    ViTBlock: {"norm1": ("attn",), "norm2": ("mlp",)},
}
# The linear maps of a part that read its input first.
READERS: dict[type, tuple[str, ...]] = {
    **dict.fromkeys(
        (SS2D, efficientvmamba.ES2D, localmamba.LocalSS2D, spatialmamba.StructureAwareSSM, VimMixer, NCSSD),
        ("in_proj",),
    ),
    mambavision.MambaVisionMixer: ("in_proj",),
    efficientvmamba.ConvBranch: ("conv1",),
    vssd.Attention: ("qkv",),
    ViTAttention: ("qkv",),
    Mlp: ("fc1",),
    groupmamba.DepthwiseMlp: ("fc1",),
    SpatialMix: ("key", "value", "receptance"),
    ChannelMix: ("key", "receptance"),
}


def _inputs(name: str, block: nn.Module) -> Iterator[Axis]:
    """From a block's norms to the maps that read them.

    RWKV's shift moves each channel between tokens, and 0 beyond a border stays 0. If timm's attention has a gate, the
    gate reads the norm too.
    """
    if getattr(block, "post_norm", False):
        return
    for norm, parts in NORMS[type(block)].items():
        modules = [attrgetter(part)(block) for part in parts]  # None for the MLP of a block that has none
        kinds = [type(module) for module in modules]
        if not all(kind in READERS for kind in kinds) or getattr(modules[0], "gate", None) is not None:
            continue
        prefix = f"{name}.{norm}"
        slots = tuple(Slot(f"{prefix}.{key}", 0, -1) for key, _ in getattr(block, norm).named_parameters())
        readers = [f"{part}.{reader}" for part, kind in zip(parts, kinds, strict=True) for reader in READERS[kind]]
        for reader in readers:
            dim = 0 if _depthwise(block.get_submodule(reader)) else 1
            slots += (Slot(f"{name}.{reader}.weight", dim, 1),)
        size = getattr(block, norm).weight.numel()
        yield Axis(prefix, size, slots, SCALE, tap=f"{name}.{readers[0]}")


def invariances(model: nn.Module) -> list[Axis]:
    """The axes that a model's families declare, block by block; nothing for unknown modules.

    Declared are Vim, VMamba, GroupMamba (the grouped parts and MLPs), EfficientVMamba (the blocks that scan),
    LocalMamba, MambaVision, VSSD, Spatial-Mamba, VideoMamba, Vision-RWKV, the plain ViTs, and the attention of KAT
    and other ViTs.
    """
    found: list[Axis] = []
    for name, module in model.named_modules():
        if type(module) in MODULES:
            found += MODULES[type(module)](name, module)
        if type(module) in NORMS:
            found += _inputs(name, module)
    return found
