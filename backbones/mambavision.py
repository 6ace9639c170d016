"""MambaVision.

Paper: MambaVision: A Hybrid Mamba-Transformer Vision Backbone (CVPR 2025) - https://arxiv.org/abs/2407.08083

Two convolutional stages, then two windowed ones. In these, the first half of a stage's blocks scans the tokens of each
window, next to a branch without a scan; the second half uses softmax attention. Written from the paper's equations;
the authors' code and weights are for non-commercial use.

Maps are channel-last (B, H, W, C) between stages.
"""

import warnings

import torch
import torch.nn.functional as F
from timm.layers import Attention, ConvNormAct, DropPath, LayerScale, Mlp, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .layers import S6, Conv2dNHWC, Pyramid, SoftSort, Stage, zero_pad
from .layers.checkpoint import rename, unwrap_state_dict
from .layers.norm import BatchNormNHWC
from .layers.pretrained import imagenet_cfg

__all__ = ["MambaVision"]


class ConvBlock(nn.Module):
    """``x + BN(conv(GELU(BN(conv(x)))))`` with 3x3 convolutions and the tanh GELU, on ``(B, H, W, C)``."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x.permute(0, 3, 1, 2))))
        return x + self.drop_path(self.norm2(self.conv2(y))).permute(0, 2, 3, 1)


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class MambaVisionMixer(nn.Module):
    """A scan in one half of the channels, only a convolution in the other, on the tokens ``(B, L, C)`` of windows.

    ``[x, z] = W_in u;  x, z = SiLU(conv(x)), SiLU(conv(z));  W_out [S6(x), z]``: the convolutions are centred, 3 taps
    along the tokens, and z is no gate.

    With `reorder` (arXiv 2410.03292) the scan's tokens are sorted by increasing ``k . (W_dt r + b)``, computed from
    their step sizes before the softplus: "soft" mixes them by a `SoftSort`, "hard" permutes them. z is not sorted, and
    the scan's output is not sorted back.
    """

    def __init__(self, dim: int, d_state: int = 8, reorder: str | None = None, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        half = dim // 2
        self.in_proj = nn.Linear(dim, 2 * half, bias=False, **dd)
        self.conv_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False, **dd)
        self.conv_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False, **dd)
        self.s6 = S6(half, 1, d_state, dt_rank=-(-dim // 16), bias_twice=True, **dd)
        self.out_proj = nn.Linear(2 * half, dim, bias=False, **dd)
        self.importance = nn.Linear(half, 1, bias=False, **dd) if reorder else None
        self.sort = SoftSort(hard=reorder == "hard")

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).mT.chunk(2, dim=1)
        x, z = (F.silu(conv(part)).mT for conv, part in ((self.conv_x, x), (self.conv_z, z)))
        return self.out_proj(torch.cat([self.scan(x.contiguous()), z], dim=-1))

    def scan(self, x: Tensor) -> Tensor:
        """The scan of ``(B, L, C / 2)``; its output is in the order of its tokens."""
        if self.importance is None:
            return self.s6(x, merge=True)
        scores = self.scores(x)
        if torch.is_grad_enabled() or not self.sort.hard:
            return self.s6(self.sort(scores) @ x, merge=True)
        order = self.sort.order(scores.unsqueeze(1))
        y = self.s6(x, order, merge=True)
        return y.gather(1, order.mT.expand_as(y).long())

    def scores(self, x: Tensor) -> Tensor:
        """The importance of each token ``(B, L)``."""
        r = F.linear(x, self.s6.x_proj[0, : self.s6.dt_rank])
        return self.importance(F.linear(r, self.s6.dt_weight[0], self.s6.dt_bias[0])).squeeze(-1)


class Block(nn.Module):
    """``x += g1 Mixer(LN(x)); x += g2 MLP(LN(x))`` on ``(B, L, C)``, with layer scales g where `init_values` is set."""

    def __init__(
        self, dim: int, mixer: nn.Module, init_values: float | None, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = mixer
        self.scale1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.scale2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


@register_notrace_module  # FX cannot trace windows, which depend on the map's size
class WindowStage(Stage):
    """A `Stage` whose blocks see the tokens ``(B windows, w w, C)`` of windows of side w that do not overlap.

    The map is padded with zeros on the right and below. The padding takes part in every block and is cut off after the
    last one. If one window is larger than the map, a warning says so once.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module, window: int):
        super().__init__(blocks, downsample)
        self.window = window

    def run_blocks(self, x: Tensor) -> Tensor:
        """Runs only the blocks."""
        (_, height, width, _), w = x.shape, self.window
        if not torch.compiler.is_compiling() and w > max(height, width):
            warnings.warn(
                f"window_size: a window of {w} x {w} is larger than the map of {height} x {width}, which is filled up "
                "with zeros that every token sees; a smaller window_size costs less",
                stacklevel=2,
            )
        x = zero_pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, cols = x.shape[1] // w, x.shape[2] // w
        x = x.unflatten(2, (cols, w)).unflatten(1, (rows, w)).transpose(2, 3)
        shape = x.shape
        x = super().run_blocks(x.flatten(3, 4).flatten(0, 2)).view(shape)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if not torch.jit.is_tracing():  # torch.export does not see it, and would guess
            torch._check(height <= x.shape[1])
            torch._check(width <= x.shape[2])
        return x[:, :height, :width].contiguous()


class MambaVision(Pyramid):
    """MambaVision (arXiv 2407.08083).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        stem_dim: Channels between the stem's convolutions.
        dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks of each stage.
        num_heads: Attention heads of the last two stages.
        window_size: Window sides of the last two stages. If windows are larger than the map, attention is global, and
            the map is padded with zeros that attention sees.
        init_values: Initial layer scales; None for none.
        reorder: "soft" or "hard" sorts the tokens of the first block of each windowed stage by importance; None for
            none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.

    Raises:
        ValueError: `window_size` is not a pair of positive integers, heads do not divide a stage's channels, or there
            is no such `reorder`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        dim: int = 80,
        depths: tuple[int, ...] = (1, 3, 8, 4),
        num_heads: tuple[int, int] = (8, 16),
        window_size: tuple[int, int] = (14, 7),
        init_values: float | None = None,
        reorder: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        if reorder not in (None, "soft", "hard"):
            raise ValueError(f"reorder: expected 'soft', 'hard' or None, got {reorder!r}")
        dims = [dim * 2**i for i in range(4)]
        super().__init__(tuple(dims), 4, in_chans, num_classes, drop_rate)
        sizes = tuple(window_size) if isinstance(window_size, (tuple, list)) else ()
        if len(sizes) != 2 or not all(isinstance(w, int) and w > 0 for w in sizes):
            raise ValueError(f"window_size: expected two positive integers, of stages 3 and 4, got {window_size!r}")
        for heads, channels in zip(num_heads, dims[2:], strict=True):
            if channels % heads:
                raise ValueError(f"num_heads: expected divisors of {dims[2]} and {dims[3]}, got {num_heads!r}")

        conv = dict(kernel_size=3, stride=2, norm_layer=nn.BatchNorm2d, norm_kwargs={"eps": 1e-4}, act_layer=nn.ReLU)
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, stem_dim, **conv, **dd), ConvNormAct(stem_dim, dim, **conv, **dd), ToNHWC()
        )
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages: list[nn.Module] = []
        for i, width in enumerate(dims):
            down = Conv2dNHWC(dims[i - 1], width, 3, 2, padding=1, bias=False, **dd) if i else None
            if down is None or i < 2:
                stages.append(Stage([ConvBlock(width, rate, **dd) for rate in rates[i]], down))
                continue
            scans = depths[i] // 2 + depths[i] % 2
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates[i]):
                mixer = MambaVisionMixer(width, reorder=None if j else reorder, **dd)
                if j >= scans:
                    mixer = Attention(width, num_heads[i - 2], qkv_bias=True, **dd)
                blocks.append(Block(width, mixer, init_values, rate, **dd))
            stages.append(WindowStage(blocks, down, sizes[i - 2]))
        self.stages = nn.Sequential(*stages)
        self.norm = BatchNormNHWC(dims[-1], **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises all linear maps alike, also the scans': the published models started with a step bias of 0."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, S6):
                module.init_as_linear()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters of the scans that are vectors, or marked, in the published code: A, D and the step's bias."""
        return {n for n, _ in self.named_parameters() if n.endswith((".s6.A_log", ".s6.D", ".s6.dt_bias"))}


class ToNHWC(nn.Module):
    """``(B, C, H, W)`` to ``(B, H, W, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


# Published names and ours. A stage's downsampling belongs to the next one here.
_RENAMES = [
    (r"^(?:module\.|encoder\.|model\.)+", ""),
    (r"^patch_embed\.conv_down\.0\.", "stem.0.conv."),
    (r"^patch_embed\.conv_down\.1\.", "stem.0.bn."),
    (r"^patch_embed\.conv_down\.3\.", "stem.1.conv."),
    (r"^patch_embed\.conv_down\.4\.", "stem.1.bn."),
    (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    (r"\.gamma_([12])$", r".scale\1.gamma"),
    (r"\.mixer\.conv1d_([xz])\.", r".mixer.conv_\1."),
    (r"\.mixer\.x_proj\.weight$", ".mixer.s6.x_proj"),
    (r"\.mixer\.dt_proj\.weight$", ".mixer.s6.dt_weight"),
    (r"\.mixer\.dt_proj\.bias$", ".mixer.s6.dt_bias"),
    (r"\.mixer\.imporantness\.", ".mixer.importance."),
    (r"\.mixer\.(A_log|D)$", r".mixer.s6.\1"),
    (r"^head\.(?!fc\.)", "head.fc."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts the published state dict to ours."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.0.conv.weight" in state_dict:
        return state_dict
    out = {rename(key, _RENAMES): value for key, value in state_dict.items()}
    return {key: value.unsqueeze(0) if ".s6." in key else value for key, value in out.items()}


def _cfg(**kwargs):
    cfg = dict(
        crop_pct=1.0,
        license="nvidia-source-code-license-nc (non-commercial)",
        origin_url="https://github.com/NVlabs/MambaVision",
        paper_ids="arXiv:2407.08083",
    )
    return imagenet_cfg(first_conv="stem.0.conv", classifier="head.fc", **{**cfg, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "mambavision_t.in1k": _cfg(),
        "mambavision_t_reorder.in1k": _cfg(
            crop_pct=0.875,
            license="cc-by-nc-sa-4.0 (non-commercial)",
            origin_url="https://github.com/Fsoft-AIC/Mamba-token-dynamic",
            paper_ids="arXiv:2410.03292",
        ),
        "mambavision_t2.in1k": _cfg(crop_pct=0.98),
        "mambavision_s.in1k": _cfg(crop_pct=0.93),
        "mambavision_b.in1k": _cfg(),
        "mambavision_l.in1k": _cfg(),
        "mambavision_l2.in1k": _cfg(),
    }
)


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs) -> MambaVision:
    return build_model_with_cfg(
        MambaVision,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def mambavision_t(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T."""
    return _create_mambavision("mambavision_t", pretrained, **kwargs)


@register_model
def mambavision_t_reorder(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T; scans in the first block of each windowed stage take tokens by importance (arXiv 2410.03292)."""
    return _create_mambavision("mambavision_t_reorder", pretrained, **dict(dict(reorder="soft"), **kwargs))


@register_model
def mambavision_t2(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T2: three more blocks in the third stage."""
    return _create_mambavision("mambavision_t2", pretrained, **dict(dict(depths=(1, 3, 11, 4)), **kwargs))


@register_model
def mambavision_s(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-S."""
    model_args = dict(dim=96, stem_dim=64, depths=(3, 3, 7, 5))
    return _create_mambavision("mambavision_s", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_b(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-B, also for the weights from ImageNet-21k."""
    model_args = dict(dim=128, stem_dim=64, depths=(3, 3, 10, 5), init_values=1e-5)
    return _create_mambavision("mambavision_b", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_l(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L, also for the weights from ImageNet-21k."""
    model_args = dict(dim=196, stem_dim=64, depths=(3, 3, 10, 5), num_heads=(16, 32), init_values=1e-5)
    return _create_mambavision("mambavision_l", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_l2(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L2: two more blocks in the third stage than L; ``window_size=(32, 16)`` for the 512 px weights."""
    model_args = dict(dim=196, stem_dim=64, depths=(3, 3, 12, 5), num_heads=(16, 32), init_values=1e-5)
    return _create_mambavision("mambavision_l2", pretrained, **dict(model_args, **kwargs))
