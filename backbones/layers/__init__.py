"""Layers that more than one family uses and timm does not have."""

from .checkpoint import unwrap_state_dict
from .conv import Conv2dNHWC, ConvDownsample
from .grouped_linear import GroupedLinear, grouped_linear
from .norm import GroupedLayerNorm
from .pyramid import Pyramid, Stage
from .s6 import S6
from .ss2d import SS2D

__all__ = [
    "S6",
    "SS2D",
    "Conv2dNHWC",
    "ConvDownsample",
    "GroupedLayerNorm",
    "GroupedLinear",
    "Pyramid",
    "Stage",
    "grouped_linear",
    "unwrap_state_dict",
]
