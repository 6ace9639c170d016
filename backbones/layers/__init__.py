"""Layers that more than one family uses and timm does not have."""

from .channel_gate import ChannelGate
from .checkpoint import unwrap_state_dict
from .conv import Conv2dNHWC, ConvDownsample
from .grkan import GRKAN, GroupRational
from .grouped_linear import GroupedLinear, grouped_linear
from .isotropic import Isotropic, resize_pos_embed
from .norm import GroupedLayerNorm, RMSNorm
from .padding import zero_pad
from .pyramid import Pyramid, Stage
from .s4 import LSSL, S4, S4D, S4ND
from .s5 import S5, ConvS5, ConvS5Layer, S5Mixer
from .s6 import S6
from .ss2d import SS2D
from .vim_mixer import CausalConv, VimMixer

__all__ = [
    "GRKAN",
    "LSSL",
    "S4",
    "S4D",
    "S4ND",
    "S5",
    "S5Mixer",
    "S6",
    "SS2D",
    "CausalConv",
    "ChannelGate",
    "Conv2dNHWC",
    "ConvDownsample",
    "ConvS5",
    "ConvS5Layer",
    "GroupRational",
    "GroupedLayerNorm",
    "GroupedLinear",
    "Isotropic",
    "Pyramid",
    "RMSNorm",
    "Stage",
    "VimMixer",
    "grouped_linear",
    "resize_pos_embed",
    "unwrap_state_dict",
    "zero_pad",
]
