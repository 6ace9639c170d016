"""Padding."""

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_function


def zero_pad(x, pad):
    """`torch.nn.functional.pad` with zeros (negative: cropping) that copies only if there is something to pad.

    Programs from `torch.export` always pad, so that the traced sizes do not decide for all others.
    """
    return F.pad(x, pad) if torch.compiler.is_exporting() or any(pad) else x


@register_notrace_function  # FX cannot trace what depends on the image's size
def pad_to_multiple(x, multiple):
    """Images ``(B, C, H, W)``, padded with 0 on the right and below until their sides are multiples of `multiple`."""
    height, width = x.shape[2:]
    return zero_pad(x, (0, -width % multiple, 0, -height % multiple))
