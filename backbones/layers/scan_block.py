"""The block of MambaIR: a scan, then convolutions with channel attention. Maps are channel-last (B, H, W, C)."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .checkpoint import SS2D_NAMES
from .conv import Conv2dNHWC


class ChannelAttention(nn.Module):
    """``x * sigmoid(W_2 ReLU(W_1 mean x))`` of a map ``(B, H, W, C)``, with inner width ``C // reduction``."""

    def __init__(self, dim: int, reduction: int = 30, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // reduction, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))).sigmoid()


class ConvMixer(nn.Sequential):
    """Channel mixer of a map ``(B, H, W, C)``: convolutions and channel attention (MambaIR, section 3.3).

    Two 3x3 convolutions through ``C // 3`` channels. With `light` they go through ``C // 2`` channels, each 1x1 and
    then depthwise 3x3; the second one is dilated.
    """

    def __init__(self, dim: int, light: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        if light:
            inner = dim // 2
            enter = [Conv2dNHWC(dim, inner, 1, **dd), Conv2dNHWC(inner, inner, 3, padding=1, groups=inner, **dd)]
            leave = [Conv2dNHWC(inner, dim, 1, **dd),
                     Conv2dNHWC(dim, dim, 3, padding=2, dilation=2, groups=dim, **dd)]  # fmt: skip
        else:
            enter = [Conv2dNHWC(dim, dim // 3, 3, padding=1, **dd)]
            leave = [Conv2dNHWC(dim // 3, dim, 3, padding=1, **dd)]
        super().__init__(*enter, nn.GELU(), *leave, ChannelAttention(dim, **dd))


class ScanBlock(nn.Module):
    """``x = s_1 x + mixer(LN(x));  x = s_2 x + ConvMixer(LN(x))`` with learnt scales s per channel."""

    def __init__(
        self, dim: int, mixer: nn.Module, light: bool = False, drop_path: float = 0.0, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = ConvMixer(dim, light, **dd)
        self.scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale1)
        nn.init.ones_(self.scale2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale1 + self.drop_path(self.mixer(self.norm1(x)))
        return x * self.scale2 + self.mlp(self.norm2(x))


# Published names for its parts, and ours; their order matters.
SCAN_BLOCK_NAMES = [
    (r"\.self_attention\.", ".op."),
    *SS2D_NAMES,
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.skip_scale$", ".scale1"),
    (r"\.skip_scale2$", ".scale2"),
]
CONV_MIXER_NAMES = [
    (r"\.conv_blk\.cab\.(\d)\.attention\.1\.", r".mlp.\1.fc1."),
    (r"\.conv_blk\.cab\.(\d)\.attention\.3\.", r".mlp.\1.fc2."),
    (r"\.conv_blk\.cab\.", ".mlp."),
]
