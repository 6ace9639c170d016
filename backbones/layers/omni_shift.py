"""Omni-Shift, the token shift of Restore-RWKV."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from linzoo.ops import depthwise_conv2d

from .conv import Conv2dNHWC


class OmniShift(nn.Module):
    """Re-parameterised depthwise 5x5 convolution (Restore-RWKV, arXiv 2407.11087, section 3.3); ``(B, H, W, C)``.

    ``alpha_0 x + alpha_1 DW1x1(x) + alpha_2 DW3x3(x) + alpha_3 DW5x5(x)``, with zero padding. The sum of the branches
    is itself one 5x5 kernel. In training it is made from the branches at every step. For evaluation it is kept in
    `merged`, made when the module leaves training, loads a state or is initialised. `fuse` returns it as an ordinary
    convolution. (The paper numbers alpha from the largest kernel, the published code as here.)

    Args:
        dim: Channels C.
    """

    sizes = (1, 3, 5)

    def __init__(self, dim: int, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1 + len(self.sizes), **dd))
        for size in self.sizes:
            self.register_parameter(f"kernel{size}", nn.Parameter(torch.empty(dim, 1, size, size, **dd)))
        self.merged = nn.Parameter(torch.empty(dim, 1, 5, 5, **dd), requires_grad=False)
        self.register_load_state_dict_post_hook(_refresh)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.normal_(self.alpha)
        for size in self.sizes:
            nn.init.kaiming_uniform_(self.get_parameter(f"kernel{size}"), a=math.sqrt(5))  # as nn.Conv2d
        self.refresh()

    def merge(self):
        """The branches as one kernel ``(C, 1, 5, 5)``."""
        kernel = F.pad(self.alpha[0].expand(self.merged.shape[0], 1, 1, 1), (2, 2, 2, 2))
        for alpha, size in zip(self.alpha[1:], self.sizes, strict=True):
            border = (5 - size) // 2
            kernel = kernel + alpha * F.pad(self.get_parameter(f"kernel{size}"), (border,) * 4)
        return kernel

    @torch.no_grad()
    def refresh(self):
        """Updates `merged` from the branches."""
        self.merged.copy_(self.merge())

    def train(self, mode=True):
        if self.training and not mode:
            self.refresh()
        return super().train(mode)

    def forward(self, x):
        kernel = self.merge() if self.training else self.merged
        return depthwise_conv2d(x, kernel.squeeze(1), padding=2)

    @torch.no_grad()
    def fuse(self):
        """The same map as one convolution."""
        dim, dd = self.merged.shape[0], {"device": self.merged.device, "dtype": self.merged.dtype}
        conv = Conv2dNHWC(dim, dim, 5, padding=2, groups=dim, bias=False, **dd)
        conv.weight.copy_(self.merge())
        return conv


def _refresh(module, incompatible_keys):
    module.refresh()


# The authors' names for the parts, and ours.
OMNI_SHIFT_NAMES = [
    (r"\.omni_shift\.conv(\d)x\1\.weight$", r".omni_shift.kernel\1"),
    (r"\.omni_shift\.conv5x5_reparam\.weight$", ".omni_shift.merged"),
]
