"""Padding."""

import torch
import torch.nn.functional as F


def zero_pad(x, pad):
    """`torch.nn.functional.pad` with zeros (negative: cropping) that copies only where there is something to pad.

    Programs made by `torch.export` always pad, so that the sizes they are traced with do not decide for all others.
    """
    return F.pad(x, pad) if torch.compiler.is_exporting() or any(pad) else x
