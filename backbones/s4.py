"""Images as sequences of pixels, for state spaces: S4D and S5, each also with perturbed state matrices (PTD).

Papers: On the Parameterization and Initialization of Diagonal State Space Models (NeurIPS 2022)
- https://arxiv.org/abs/2206.11893
Simplified State Space Layers for Sequence Modeling (ICLR 2023) - https://arxiv.org/abs/2208.04933
Robustifying State-space Models for Long Sequences via Approximate Diagonalization (ICLR 2024)
- https://arxiv.org/abs/2310.01698

A token is a pixel, in raster order, without position: the layout of sequential CIFAR, 1,024 steps for a 32 px image.
"""

from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .layers import S4D, Isotropic, S5Mixer, unwrap_state_dict

__all__ = ["PixelS4D", "PixelS5"]


class Block(nn.Module):
    """``x += Mixer(LN(x))`` on tokens ``(B, L, C)``; the grid of the pixels is ignored."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid):
        return x + self.drop_path(self.mixer(self.norm(x)))


class PixelSequence(Isotropic):
    """Base of both models: an encoder of pixels, blocks of `mixer`, a mean over the pixels, a linear classifier.

    Args:
        img_size: Ignored: images of any size are sequences.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: As in `Isotropic`, without 'token'.
        dim: Width.
        depth: Blocks.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout within the mixers.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this.
        mixer: Class of the mixers; it receives the further arguments.
    """

    mixer = None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        dim: int = 128,
        depth: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **mixer_args,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        base = dict(img_size=img_size, patch_size=1, stride=1, in_chans=in_chans, num_classes=num_classes)
        base |= dict(global_pool=global_pool, dim=dim, depth=depth, class_token=False, positions=False)
        super().__init__(**base, drop_rate=drop_rate, **dd)
        self.blocks = nn.ModuleList(
            Block(dim, self.mixer(dim, drop=proj_drop_rate, bidirectional=True, **mixer_args, **dd), rate, **dd)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.init_weights(needs_reset=False)


class PixelS4D(PixelSequence):
    """Pixels through bidirectional `layers.S4D`, which takes `d_state`, `init` and the rest."""

    mixer = S4D


class PixelS5(PixelSequence):
    """Pixels through bidirectional `layers.S5Mixer`, which takes `d_state`, `blocks`, `init` and the rest."""

    mixer = S5Mixer


def checkpoint_filter_fn(state_dict, model):
    """For our own checkpoints; the published code has no weights for these models."""
    return unwrap_state_dict(state_dict)


def _cfg(*papers):
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "min_input_size": (3, 1, 1),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10's
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "patch_embed",
        "classifier": "head",
        "paper_ids": [f"arXiv:{paper}" for paper in papers],
    }


default_cfgs = generate_default_cfgs(
    {
        "s4d_pixel_s.untrained": _cfg("2206.11893"),
        "s4d_pixel_s_ptd.untrained": _cfg("2206.11893", "2310.01698"),
        "s5_pixel_s.untrained": _cfg("2208.04933"),
        "s5_pixel_s_ptd.untrained": _cfg("2208.04933", "2310.01698"),
    }
)


def _create(kind, variant, pretrained=False, **kwargs):
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **kwargs,
    )


@register_model
def s4d_pixel_s(pretrained=False, **kwargs):
    """Four blocks of S4D with the size of the authors' example for sequential CIFAR, here in both directions."""
    return _create(PixelS4D, "s4d_pixel_s", pretrained, **dict(dict(d_state=64, init="inv"), **kwargs))


@register_model
def s5_pixel_s(pretrained=False, **kwargs):
    """Four blocks of S5."""
    return _create(PixelS5, "s5_pixel_s", pretrained, **dict(dict(d_state=128, blocks=4), **kwargs))


@register_model
def s4d_pixel_s_ptd(pretrained=False, **kwargs):
    """S4-PTD: diagonal kernels with all modes of a perturbed HiPPO-LegS matrix."""
    return _create(PixelS4D, "s4d_pixel_s_ptd", pretrained, **dict(dict(d_state=32, init="ptd"), **kwargs))


@register_model
def s5_pixel_s_ptd(pretrained=False, **kwargs):
    """S5-PTD: S5 with all modes of perturbed HiPPO-LegS blocks."""
    return _create(PixelS5, "s5_pixel_s_ptd", pretrained, **dict(dict(d_state=128, blocks=4, init="ptd"), **kwargs))
