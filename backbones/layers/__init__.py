"""Layers that more than one family uses and timm does not have."""

from .grouped_linear import GroupedLinear, grouped_linear
from .s6 import S6

__all__ = ["S6", "GroupedLinear", "grouped_linear"]
