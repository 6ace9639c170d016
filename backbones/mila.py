"""MILA, first called MLLA.

Paper: Demystify Mamba in Vision: A Linear Attention Perspective (NeurIPS 2024) - https://arxiv.org/abs/2405.16605

A four-stage pyramid. All blocks are Mamba's, with linear attention instead of the scan. The attention is normalised and
has rotary positions for rows and columns; a depthwise convolution of the values is added to it.

Maps are channel-last (B, H, W, C) throughout.
"""

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from .layers import Conv2dNHWC, Pyramid, Stage
from .layers.checkpoint import rename, unwrap_state_dict
from .layers.mlla import MLLA_NAMES, MLLABlock, MLLADownsample, MLLAStem, mlla_downsample_name
from .layers.pretrained import imagenet_cfg
from .layers.rope import axial_angles, turn

__all__ = ["MILA"]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Normalised linear attention with rotary positions, for a map's positive q, k and for v, all ``(B, H, W, C)``.

    ``y_i = R(q_i)^T (sum_j R(k_j) v_j^T) / (q_i . sum_j k_j)`` per head; the normaliser is not rotated. Sums are
    computed as means, so that they stay in range for any number of tokens.
    """
    height, width, channels = q.shape[1:]
    row, column = (torch.arange(n, dtype=torch.float32, device=q.device) for n in (height, width))
    angle = axial_angles(row, column, channels // 4)
    cos, sin = angle.cos(), angle.sin()
    heads = (num_heads, channels // num_heads)
    turned_q, turned_k = (turn(x.float(), cos, sin).to(x.dtype).flatten(1, 2).unflatten(2, heads) for x in (q, k))
    q, k, v = (x.flatten(1, 2).unflatten(2, heads) for x in (q, k, v))
    norm = (q * k.mean(1, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    scale = (height * width) ** -0.5
    memory = (turned_k * scale).permute(0, 2, 3, 1) @ (v * scale).transpose(1, 2)
    y = (turned_q.transpose(1, 2) @ memory).transpose(1, 2)
    return (y / norm).flatten(2).unflatten(1, (height, width))


@register_notrace_module  # FX cannot trace positions, which depend on the map's size
class MILAMixer(nn.Module):
    """``v = SiLU(DWConv(W_in u));  [q, k] = elu(W_qk v) + 1;  W_out ((attention(q, k, v) + DWConv(v)) SiLU(W_g u))``.

    Args:
        dim: Channels C of the map ``(B, H, W, C)``.
        num_heads: Heads of neighbouring channels.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, dim, **dd)
        self.gate = nn.Linear(dim, dim, **dd)
        self.conv = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.qk = nn.Linear(dim, 2 * dim, **dd)
        self.lepe = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)

    def forward(self, u: Tensor) -> Tensor:
        v = F.silu(self.conv(self.in_proj(u)))
        q, k = (F.elu(self.qk(v)) + 1).chunk(2, dim=-1)
        y = linear_attention(q, k, v, self.num_heads) + self.lepe(v)
        return self.out_proj(y * F.silu(self.gate(u)))


class MILA(Pyramid):
    """MILA (arXiv 2405.16605).

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling before the classifier.
        dim: Channels of the first stage; each further one has twice as many.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 64,
        depths: tuple[int, ...] = (2, 4, 8, 4),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        dims = [dim * 2**i for i in range(len(depths))]
        super().__init__(tuple(dims), 4, in_chans, num_classes, drop_rate)
        self.stem = MLLAStem(in_chans, dim, **dd)
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        for i, width in enumerate(dims):
            rates = drop_path[i]
            blocks = [MLLABlock(width, MILAMixer(width, num_heads[i], **dd), drop_path=r, **dd) for r in rates]
            stages.append(Stage(blocks, MLLADownsample(dims[i - 1], width, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5, **dd)
        self.head = self.classifier_head(global_pool, **dd)
        self.init_weights(needs_reset=False)


# Published names of the mixer, and ours.
_RENAMES = [
    *MLLA_NAMES,
    (r"\.(in_proj|out_proj)\.", r".mixer.\1."),
    (r"\.act_proj\.", ".mixer.gate."),
    (r"\.dwc\.", ".mixer.conv."),
    (r"\.attn\.", ".mixer."),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts the published state dict to ours; tables of rotary positions are dropped, since they are computed."""
    state_dict = unwrap_state_dict(state_dict)
    if "stem.conv1.conv.weight" in state_dict:
        return state_dict
    kept = {key: value for key, value in state_dict.items() if not key.endswith(".rope.rotations")}
    return {rename(mlla_downsample_name(key), _RENAMES): value for key, value in kept.items()}


def _cfg(**kwargs):
    return imagenet_cfg(
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        origin_url="https://github.com/LeapLabTHU/MLLA",
        paper_ids="arXiv:2405.16605",
        **kwargs,
    )


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg() for name in ("mila_t", "mila_s", "mila_b")})


def _create_mila(variant: str, pretrained: bool = False, **kwargs) -> MILA:
    return build_model_with_cfg(
        MILA,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


@register_model
def mila_t(pretrained: bool = False, **kwargs) -> MILA:
    """MILA-T."""
    return _create_mila("mila_t", pretrained, **kwargs)


@register_model
def mila_s(pretrained: bool = False, **kwargs) -> MILA:
    """MILA-S."""
    return _create_mila("mila_s", pretrained, **dict(dict(depths=(3, 6, 21, 6)), **kwargs))


@register_model
def mila_b(pretrained: bool = False, **kwargs) -> MILA:
    """MILA-B."""
    model_args = dict(dim=96, depths=(3, 6, 21, 6), num_heads=(3, 6, 12, 24))
    return _create_mila("mila_b", pretrained, **dict(model_args, **kwargs))
