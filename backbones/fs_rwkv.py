"""FS-RWKV.

Paper: FS-RWKV: Leveraging Frequency Spatial-Aware RWKV for 3T-to-7T MRI Translation
- https://arxiv.org/abs/2510.08951

Restore-RWKV with a token shift on the low band of a wavelet transform (FSO-Shift), and with skip connections that pass
a block that fuses spatial and frequency features (SFEB). No code was published. What the abstract leaves open is our
choice, listed in the model card.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers import Conv2dNHWC, OmniShift
from .layers.haar import haar, inverse_haar
from .layers.rwkv_unet import RWKVUNet

__all__ = ["FSRWKV"]


def bands(x: Tensor) -> list[Tensor]:
    """The bands LL, LH (changes along rows), HL (along columns) and HH of a map with even sides."""
    return [band for half in haar(x, -3) for band in haar(half, -2)]


def from_bands(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor) -> Tensor:
    """The inverse of `bands`."""
    return inverse_haar(inverse_haar(ll, lh, -2), inverse_haar(hl, hh, -2), -3)


class FSOShift(nn.Module):
    """Frequency-spatial omnidirectional shift: Omni-Shift of the low band of a Haar transform, ``(B, H, W, C)``.

    The high bands, which hold fine structure, pass unchanged. Odd sides are padded by repetition.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.low = OmniShift(dim, device=device, dtype=dtype)

    def forward(self, x):
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x.permute(0, 3, 1, 2), (0, W % 2, 0, H % 2), mode="replicate").permute(0, 2, 3, 1)
        ll, *high = bands(x)
        return from_bands(self.low(ll), *high)[:, :H, :W]


class SFEB(nn.Module):
    """Structural fidelity enhancement block on a map ``(B, C, H, W)``: gated spatial and frequency features.

    ``s = W_s GELU(DWConv(x));  f = IFFT(W_f GELU(W_e FFT(x)));  g = sigmoid(W_g [s, f]);  x + g s + (1 - g) f``. The
    1x1 convolutions W_e and W_f mix real and imaginary parts of each frequency of the real FFT. W_s and W_f start
    small, so the block starts near the identity.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.depthwise = Conv2dNHWC(dim, dim, 3, padding=1, groups=dim, **dd)
        self.spatial = nn.Linear(dim, dim, **dd)
        self.enter = nn.Linear(2 * dim, 2 * dim, **dd)
        self.leave = nn.Linear(2 * dim, 2 * dim, **dd)
        self.gate = nn.Linear(2 * dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        for layer in (self.spatial, self.leave):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        s = self.spatial(F.gelu(self.depthwise(x)))
        f = self.frequency(x)
        g = torch.sigmoid(self.gate(torch.cat([s, f], -1)))
        return (x + g * s + (1 - g) * f).permute(0, 3, 1, 2)

    def frequency(self, x):
        """The frequency branch of a map ``(B, H, W, C)``."""
        size, wide = x.shape[1:3], x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho")
        mixed = self.leave(
            F.gelu(self.enter(torch.cat([spectrum.real, spectrum.imag], -1).to(self.enter.weight.dtype)))
        )
        real, imag = mixed.to(wide.dtype).chunk(2, -1)
        return torch.fft.irfft2(torch.complex(real, imag), s=size, dim=(1, 2), norm="ortho").to(x.dtype)


class FSRWKV(RWKVUNet):
    """FS-RWKV (arXiv 2510.08951): Restore-RWKV's U-Net with FSO-Shift as its token shift and SFEB on its skips.

    Args:
        in_chans, dim, depths, refinement: As in `RWKVUNet`.
    """

    multiple = 16  # the deepest level's low band has half its size

    def __init__(
        self,
        in_chans: int = 1,
        dim: int = 48,
        depths: tuple[int, ...] = (4, 6, 6, 8),
        refinement: int = 4,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(in_chans, dim, depths, refinement, FSOShift, **dd)
        self.enhance = nn.ModuleList(SFEB(dim * 2**i, **dd) for i in range(len(depths) - 1))

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        matcher = super().group_matcher(coarse)
        return matcher | dict(blocks=[*matcher["blocks"], (r"^enhance\.(\d+)", (9999,))])

    def skip(self, x, level):
        return self.enhance[level](x)


def _cfg(**kwargs):
    return {
        "num_classes": 1,
        "input_size": (1, 128, 128),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "stem",
        "classifier": "head",
        "paper_ids": "arXiv:2510.08951",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"fs_rwkv": _cfg()})


@register_model
def fs_rwkv(pretrained=False, **kwargs):
    """FS-RWKV with the sizes of Restore-RWKV."""
    return build_model_with_cfg(FSRWKV, "fs_rwkv", pretrained, kwargs_filter=("num_classes",), **kwargs)
