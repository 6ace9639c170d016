"""HRVMamba.

Paper: HRVMamba: High-Resolution Visual State Space Model for Dense Prediction
- https://arxiv.org/abs/2410.03174

HRNet's parallel streams at strides 4, 8, 16 and 32. Its convolution blocks are replaced by dynamic visual state space
(DVSS) blocks: depthwise convolutions of four sizes, then VMamba's four-route scan after a deformable convolution.

Streams are NCHW between blocks, in channels-last memory, and channel-last (B, H, W, C) inside them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import (
    ConvNormAct,
    DropPath,
    MixedConv2d,
    Mlp,
    SqueezeExcite,
    calculate_drop_path_rates,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import FeatureHookNet, feature_take_indices
from timm.models._features_fx import register_notrace_module
from timm.models.resnet import Bottleneck, downsample_conv
from torch import nn

from linzoo.ops import deform_conv, depthwise_conv2d

from .layers import SS2D, Conv2dNHWC, Pyramid, Stage
from .layers.checkpoint import SS2D_NAMES, rename, reshape_as, unwrap_state_dict
from .layers.pretrained import imagenet_cfg

__all__ = ["HRVMamba"]

TAPS = 9  # of DCNv4's 3x3 window


class DCNv4(nn.Module):
    """Deformable 3x3 convolution DCNv4 (arXiv 2401.06197) of a map ``(B, H, W, C)``, without its projections.

    ``(offset, weight) = W q;  y = deform_conv(x, offset, weight)``, where q is x or, with `offset_conv`, DWConv(x).

    Args:
        dim: Channels C.
        groups: Groups of channels that share offsets.
        offset_conv: Whether a depthwise convolution precedes the projection to offsets.
    """

    def __init__(self, dim: int, groups: int, offset_conv: bool = False, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.groups = groups
        used = 3 * TAPS * groups
        self.offset_mask_dw = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd) if offset_conv else nn.Identity()
        self.offset_mask = nn.Linear(dim, used + -used % 8, **dd)  # as published: padded to a multiple of 8

    def forward(self, x):
        taps = self.offset_mask(self.offset_mask_dw(x))[..., : 3 * TAPS * self.groups].unflatten(-1, (self.groups, -1))
        offset, weight = taps.split([2 * TAPS, TAPS], dim=-1)
        return deform_conv(x, offset.unflatten(-1, (TAPS, 2)), weight)


class Gate(SqueezeExcite):
    """Squeeze and excite of a map ``(B, H, W, C)``, by linear maps: 1x1 convolutions of one point are slow."""

    def forward(self, x):
        squeezed = self.act(F.linear(x.mean((1, 2)), self.fc1.weight.flatten(1)))
        return x * self.gate(F.linear(squeezed, self.fc2.weight.flatten(1)))[:, None, None]


class DSS2D(SS2D):
    """SS2D with a deformable convolution; with `squeeze`, its normalised output passes a squeeze-excite gate."""

    def __init__(self, dim: int, squeeze: bool = False, offset_conv: bool = False, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dim, **dd)
        inner = self.s6.dim
        self.conv = DCNv4(inner, groups=self.s6.dt_rank, offset_conv=offset_conv, **dd)
        self.se = Gate(inner, rd_channels=inner // 8, bias=False, **dd) if squeeze else nn.Identity()

    def forward(self, x):
        return self.out_proj(self.se(self.out_norm(self.scan(F.silu(self.conv(self.in_proj(x)))))))


class MultiScaleConv(nn.Module):
    """Depthwise convolutions 3x3 to 9x9, of a quarter of the channels each, and a channel shuffle; ``(B, H, W, C)``.

    One 9x9 convolution with zeros around the smaller kernels takes less time than four.
    """

    kernels = (3, 5, 7, 9)

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = MixedConv2d(dim, dim, list(self.kernels), depthwise=True, bias=True, device=device, dtype=dtype)

    def forward(self, x):
        convs, reach = self.conv.values(), self.kernels[-1] // 2
        weight = torch.cat([F.pad(conv.weight.squeeze(1), [reach - conv.padding[0]] * 4) for conv in convs])
        bias = torch.cat([conv.bias for conv in convs])
        y = depthwise_conv2d(x, weight, bias, padding=reach)
        return y.unflatten(-1, (len(self.kernels), -1)).transpose(-1, -2).flatten(-2)


class DVSSBlock(nn.Module):
    """Dynamic visual state space block on a map ``(B, C, H, W)``.

    ``x += GELU(MS(LN(x + CPE1(x))));  x += DSS2D(LN(x));  x += CPE2(x);  x += MLP(LN(x))``, where the depthwise
    convolutions CPE1 and CPE2, and the squeeze-excite in DSS2D, exist only with `local`.
    """

    def __init__(
        self, dim: int, local: bool = False, offset_conv: bool = False, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        norm = partial(nn.LayerNorm, dim, eps=1e-5, **dd)
        self.cpe1 = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd) if local else None
        self.norm0 = norm()
        self.multi_scale = MultiScaleConv(dim, **dd)
        self.norm1 = norm()
        self.mixer = DSS2D(dim, squeeze=local, offset_conv=offset_conv, **dd)
        self.cpe2 = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd) if local else None
        self.norm2 = norm()
        self.mlp = Mlp(dim, 2 * dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).contiguous()
        positioned = x if self.cpe1 is None else x + self.cpe1(x)
        x = x + self.drop_path(F.gelu(self.multi_scale(self.norm0(positioned))))
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.cpe2 is not None:
            x = x + self.cpe2(x)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Upward(nn.Module):
    """From stream j to the finer stream i: a 1x1 convolution and bilinear upsampling by 2^(j - i)."""

    def __init__(self, dim: int, dim_out: int, scale: float, device=None, dtype=None):
        super().__init__()
        self.conv = ConvNormAct(dim, dim_out, 1, apply_act=False, device=device, dtype=dtype)
        self.scale = scale

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=self.scale, mode="bilinear")


def downward(dim, dim_out, steps, device=None, dtype=None):
    """From stream j to the coarser stream i: i - j times a depthwise 3x3 convolution of stride 2 and a 1x1."""
    dd: dict = {"device": device, "dtype": dtype}
    layers = []
    for step in range(steps):
        last = step == steps - 1
        depthwise = ConvNormAct(dim, dim, 3, 2, groups=dim, apply_act=False, **dd)
        pointwise = ConvNormAct(dim, dim_out if last else dim, 1, apply_act=not last, **dd)
        layers.append(nn.Sequential(depthwise, pointwise))
    return nn.Sequential(*layers)


class Fusion(nn.Module):
    """What stream i receives: ``ReLU(sum_j f_ij(x_j))`` with f_ii the identity."""

    def __init__(self, dims: tuple[int, ...], i: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.i = i
        for j, dim in enumerate(dims):
            if j != i:
                path = downward(dim, dims[i], i - j, **dd) if j < i else Upward(dim, dims[i], 2 ** (j - i), **dd)
                self.add_module(str(j), path)

    def forward(self, xs):
        own, total = xs[self.i], 0
        for j, x in enumerate(xs):
            y = x if j == self.i else self.get_submodule(str(j))(x)
            if y.shape[2:] != own.shape[2:]:  # sizes were rounded up on the way down
                y = F.interpolate(y, own.shape[2:], mode="bilinear")
            total = total + y
        return total.relu()


class Exchange(nn.Module):
    """Multi-resolution module: two DVSS blocks on every stream, then every stream receives from all streams.

    Args:
        dims: Channels of each stream.
        drop_path: Rates of the two blocks.
        block: `DVSSBlock` with the arguments that all blocks of the model share.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        drop_path: Sequence[float],
        block: Callable[..., nn.Module],
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(block(dim, drop_path=r, **dd) for r in drop_path)) for dim in dims
        )
        self.fusions = nn.ModuleDict({str(i): Fusion(dims, i, **dd) for i in range(len(dims))})

    def forward(self, xs, streams=None):
        """Maps streams to streams; `streams` restricts the output to those indices."""
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        return [self.fusions[str(i)](xs) for i in (self.fusions if streams is None else streams)]


@register_notrace_module  # FX cannot trace the scan orders and fusions, which depend on the maps' sizes
class ParallelStage(nn.Module):
    """Transition to one more stream, then multi-resolution modules.

    Args:
        dims_in: Channels of the input streams.
        dims: Channels of the output streams. Streams with another width, and new ones, start from the coarsest.
        blocks: List of `Exchange`.
    """

    def __init__(
        self, dims_in: tuple[int, ...], dims: tuple[int, ...], blocks: Sequence[nn.Module], device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.transition = nn.ModuleDict()
        for i, dim in enumerate(dims):
            if i >= len(dims_in) or dims_in[i] != dim:
                self.transition[str(i)] = ConvNormAct(dims_in[-1], dim, 3, 1 + (i >= len(dims_in)), **dd)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, xs, streams=None):
        """Maps streams to streams; `streams` restricts the output to those indices."""
        new = {int(i): layer(xs[-1]) for i, layer in self.transition.items()}
        xs = [new[i] if i in new else xs[i] for i in range(len(self.blocks[0].branches))]
        for i, block in enumerate(self.blocks):
            wanted = streams if i == len(self.blocks) - 1 else None
            xs = checkpoint(block, xs, wanted) if self.grad_checkpointing else block(xs, wanted)
        return xs


class Neck(nn.Module):
    """Classification neck of HRNet: the widened streams are added from the finest down, to a map of 2048 channels."""

    widths = (128, 256, 512, 1024)
    out_width = 2048

    def __init__(self, dims: tuple[int, ...], device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.increase = nn.ModuleList(
            Bottleneck(dim, out // 4, downsample=downsample_conv(dim, out, 1, **dd), **dd)
            for dim, out in zip(dims, self.widths, strict=True)
        )
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        self.downsample = nn.ModuleList(ConvNormAct(a, b, 3, 2, **dd) for a, b in pairs)
        self.final = ConvNormAct(self.widths[-1], self.out_width, 1, **dd)

    def forward(self, xs):
        y = self.increase[0](xs[0])
        for i, down in enumerate(self.downsample, start=1):
            y = down(y) + self.increase[i](xs[i])
        return self.final(y)


class HRVMamba(Pyramid):
    """HRVMamba (arXiv 2410.03174). Its features are the four streams after the last exchange, strides 4 to 32.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dim: Channels of the finest stream; each further stream has twice as many.
        stem_dim: Inner width of the first stage's bottlenecks.
        modules: Multi-resolution modules of stages 2, 3 and 4.
        local: Depthwise position encodings in the blocks and squeeze-excite in their mixers (nano and tiny).
        offset_conv: A depthwise convolution before the offsets of the deformable convolutions (base).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first DVSS block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 32,
        stem_dim: int = 64,
        modules: tuple[int, ...] = (1, 4, 2),
        local: bool = False,
        offset_conv: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        dims = [dim * 2**i for i in range(4)]
        super().__init__(dims, 4, in_chans, num_classes, drop_rate)
        last = f"stages.3.blocks.{modules[-1] - 1}.fusions"
        for i, info in enumerate(self.feature_info):
            info["module"] = f"{last}.{i}"
        self.stem = nn.Sequential(ConvNormAct(in_chans, 64, 3, 2, **dd), ConvNormAct(64, 64, 3, 2, **dd))
        width = 4 * stem_dim
        shortcut = downsample_conv(64, width, 1, **dd) if width != 64 else None
        bottlenecks = Bottleneck(64, stem_dim, downsample=shortcut, **dd), Bottleneck(width, stem_dim, **dd)
        rates = iter(calculate_drop_path_rates(drop_path_rate, 2 * sum(modules)))
        block = partial(DVSSBlock, local=local, offset_conv=offset_conv)
        stages, dims_in = [Stage(bottlenecks)], [width]
        for i, count in enumerate(modules):
            out = dims[: i + 2]
            exchanges = [Exchange(out, (next(rates), next(rates)), block, **dd) for _ in range(count)]
            stages.append(ParallelStage(dims_in, out, exchanges, **dd))
            dims_in = out
        self.stages = nn.ModuleList(stages)
        self.neck = Neck(dims, **dd)
        self.num_features = self.neck.out_width
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        blocks = [
            (r"^stages\.(\d+)\.transition", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^neck", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^neck", (99999,))] if coarse else blocks)

    def streams(self, x, only=None):
        """Images to the four streams (B, C_i, H_i, W_i), or to those of the indices `only`."""
        xs = [self.stages[0](self.stem(x))]
        for stage in self.stages[1:-1]:
            xs = stage(xs)
        return self.stages[-1](xs, only)

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """The streams' maps; arguments as in `Pyramid.forward_intermediates`, but there is no final norm."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        if stop_early and intermediates_only:
            xs = self.streams(x, take_indices)
            taken = xs
        else:
            xs = self.streams(x)
            kept = [int(i) for i in self.stages[-1].blocks[-1].fusions]
            taken = [xs[kept.index(i)] for i in take_indices]
        intermediates = [y.contiguous() if output_fmt == "NCHW" else y.permute(0, 2, 3, 1) for y in taken]
        return intermediates if intermediates_only else (self.final_features(xs), intermediates)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Removes what the streams `indices` do not need; returns the indices, normalised.

        With `prune_head` False everything is kept, since the classifier needs every stream.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            fusions = self.stages[-1].blocks[-1].fusions
            for i in set(fusions) - {str(i) for i in take_indices}:
                del fusions[i]
            self.neck = None
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        return take_indices

    def final_features(self, x):
        """The neck's map of the streams `x`, channel-last; the coarsest stream if the neck was pruned."""
        return (x[-1] if self.neck is None else self.neck(x)).permute(0, 2, 3, 1)

    def forward_features(self, x):
        """Images ``(B, 3, H, W)`` to the neck's map ``(B, H / 32, W / 32, 2048)``."""
        return self.final_features(self.streams(x))


_RENAMES = [
    (r"^conv(\d)\.", lambda m: f"stem.{int(m[1]) - 1}.conv."),
    (r"^bn(\d)\.", lambda m: f"stem.{int(m[1]) - 1}.bn."),
    (r"^layer1\.", "stages.0.blocks."),
    (r"^transition1\.0\.", "transition1.0.0."),
    (r"^transition(\d)\.(\d)\.0\.0\.", r"stages.\1.transition.\2.conv."),
    (r"^transition(\d)\.(\d)\.0\.1\.", r"stages.\1.transition.\2.bn."),
    (r"^stage(\d)\.(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.fuse_layers\.(\d)\.(\d)\.", r".fusions.\1.\2."),
    (r"(\.fusions\.\d\.\d\.)0\.(weight|bias)$", r"\1conv.conv.\2"),
    (r"(\.fusions\.\d\.\d\.)1\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"\1conv.bn.\2"),
    (r"(\.fusions\.\d\.\d\.\d\.)(\d)\.", lambda m: f"{m[1]}{int(m[2]) // 2}.{('conv', 'bn')[int(m[2]) % 2]}."),
    (r"(\.branches\.\d\.\d\.)conv2d\.", r"\1multi_scale.conv."),
    (r"(\.branches\.\d\.\d\.)norm\.", r"\1norm1."),
    (r"\.op\.se\.fc\.0\.", ".op.se.fc1."),
    (r"\.op\.se\.fc\.2\.", ".op.se.fc2."),
    (r"^neck\.increase_layers\.(\d)\.0\.", r"neck.increase.\1."),
    (r"^neck\.downsample_layers\.", "neck.downsample."),
    (r"^neck\.final_layer\.", "neck.final."),
    (r"^head\.", "head.fc."),
    *SS2D_NAMES,
]


def checkpoint_filter_fn(state_dict, model):
    """Converts the published state dict to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.0.conv.weight" in state_dict:
        return state_dict
    return reshape_as({rename(key, _RENAMES): value for key, value in state_dict.items()}, model)


def _cfg(size=256, **kwargs):
    return imagenet_cfg(
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        min_input_size=(3, 64, 64),
        crop_pct=1.0,
        first_conv="stem.0.conv",
        classifier="head.fc",
        origin_url="https://github.com/zhanghao5201/HRVMamba",
        paper_ids="arXiv:2410.03174",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "hrvmamba_n.in1k": _cfg(),
        "hrvmamba_t.in1k": _cfg(),
        "hrvmamba_s.in1k": _cfg(),
        "hrvmamba_b.in1k": _cfg(224),
    }
)


# The streams run side by side, so timm's extractors for chains of modules and for graphs are replaced by hooks.
_FEATURES = {"fx": "hook", "list": "hook", "dict": partial(FeatureHookNet, return_dict=True)}


def _create_hrvmamba(variant, pretrained=False, **kwargs):
    if kwargs.get("feature_cls") in _FEATURES:
        kwargs["feature_cls"] = _FEATURES[kwargs["feature_cls"]]
    return build_model_with_cfg(
        HRVMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def hrvmamba_n(pretrained=False, **kwargs):
    """HRVMamba-N."""
    model_args = dict(dim=8, stem_dim=16, local=True)
    return _create_hrvmamba("hrvmamba_n", pretrained, **dict(model_args, **kwargs))


@register_model
def hrvmamba_t(pretrained=False, **kwargs):
    """HRVMamba-T."""
    model_args = dict(dim=16, stem_dim=32, local=True)
    return _create_hrvmamba("hrvmamba_t", pretrained, **dict(model_args, **kwargs))


@register_model
def hrvmamba_s(pretrained=False, **kwargs):
    """HRVMamba-S."""
    model_args = dict(dim=32, stem_dim=64)
    return _create_hrvmamba("hrvmamba_s", pretrained, **dict(model_args, **kwargs))


@register_model
def hrvmamba_b(pretrained=False, **kwargs):
    """HRVMamba-B."""
    model_args = dict(dim=80, stem_dim=64, offset_conv=True)
    return _create_hrvmamba("hrvmamba_b", pretrained, **dict(model_args, **kwargs))
