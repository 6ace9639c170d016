"""The body of MILA (MLLA, arXiv 2405.16605), VSSD and Spatial-Mamba: stem, block and downsampling.

Maps are channel-last (B, H, W, C) between these modules.
"""

from timm.layers import ConvNormAct, DropPath, Mlp
from torch import nn

from .conv import Conv2dNHWC


class MLLAStem(nn.Module):
    """Convolutions of stride 4 with a residual pair in between: ``(B, 3, H, W)`` to ``(B, H/4, W/4, C)``."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype, "act_layer": nn.ReLU}
        super().__init__()
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, 3, 2, **dd)
        self.conv2 = nn.Sequential(ConvNormAct(half, half, 3, **dd), ConvNormAct(half, half, 3, apply_act=False, **dd))
        self.conv3 = nn.Sequential(
            ConvNormAct(half, 4 * dim, 3, 2, **dd), ConvNormAct(4 * dim, dim, 1, apply_act=False, **dd)
        )

    def forward(self, x):
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x)).permute(0, 2, 3, 1)


class MLLADownsample(nn.Module):
    """Inverted bottleneck of stride 2: 1x1, depthwise 3x3, 1x1, BatchNorm; half the size, rounded up."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = 4 * dim_out
        self.conv1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, 2, padding=1, groups=hidden, **dd)
        self.conv3 = nn.Conv2d(hidden, dim_out, 1, **dd)
        self.norm = nn.BatchNorm2d(dim_out, **dd)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.conv2(self.act(self.conv1(x.permute(0, 3, 1, 2)))))
        return self.norm(self.conv3(x)).permute(0, 2, 3, 1)


class MLLABlock(nn.Module):
    """``x += DWConv(x); x += Mixer(LN(x)); x += DWConv(x); x += MLP(LN(x))``.

    Args:
        dim: Channels.
        mixer: Token mixer, a module on ``(B, H, W, C)``.
        mlp_ratio: Hidden over outer width of the MLP.
        drop_path: Stochastic depth of the mixer and the MLP.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = mixer
        self.conv2 = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.conv1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.conv2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


# Published names for parts of the body, and ours. The families add those of the mixers, including the block's name for
# its mixer.
MLLA_NAMES = [
    (r"^patch_embed\.(conv\d(?:\.\d)?)\.norm\.", r"stem.\1.bn."),
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.cpe(\d)\.", r"stages.\1.blocks.\2.conv\3."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^head\.", "head.fc."),
]


def mlla_downsample_name(key):
    """Renames ``layers.{i}.downsample.conv.{0,1,2}.{conv,norm}.*``; the downsampling belongs to the stage after it."""
    parts = key.split(".")
    if parts[0] != "layers" or parts[2] != "downsample":
        return key
    name = "norm" if parts[5] == "norm" else f"conv{int(parts[4]) + 1}"
    return f"stages.{int(parts[1]) + 1}.downsample.{name}.{parts[6]}"
