"""Layers that more than one family uses and timm does not have."""

from .channel_gate import ChannelGate
from .checkpoint import unwrap_state_dict
from .conv import Conv2dNHWC, ConvDownsample
from .fuse import fuse_for_inference
from .grkan import GRKAN, GroupRational
from .grouped_linear import GroupedLinear, grouped_linear
from .isotropic import Isotropic, resize_pos_embed
from .kan import KAN, channel_mixer
from .norm import GroupedLayerNorm, RMSNorm
from .omni_shift import OmniShift
from .padding import zero_pad
from .pyramid import Pyramid, Stage
from .rwkv import ChannelMix, RWKVBlock, SpatialMix, q_shift
from .s4 import LSSL, S4, S4D, S4ND
from .s5 import S5, ConvS5, ConvS5Layer, S5Mixer
from .s6 import S6
from .ss2d import SS2D
from .vim_mixer import CausalConv, VimMixer

__all__ = [
    "GRKAN",
    "KAN",
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
    "ChannelMix",
    "Conv2dNHWC",
    "ConvDownsample",
    "ConvS5",
    "ConvS5Layer",
    "GroupRational",
    "GroupedLayerNorm",
    "GroupedLinear",
    "Isotropic",
    "OmniShift",
    "Pyramid",
    "RMSNorm",
    "RWKVBlock",
    "SpatialMix",
    "Stage",
    "VimMixer",
    "fuse_for_inference",
    "channel_mixer",
    "grouped_linear",
    "q_shift",
    "resize_pos_embed",
    "unwrap_state_dict",
    "zero_pad",
]
