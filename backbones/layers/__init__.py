"""Layers that several families share and timm does not have."""

from .averaging import WeightedAverage
from .channel_gate import ChannelGate
from .checkpoint import unwrap_state_dict
from .conv import Conv2dNHWC, ConvDownsample
from .dynamics import DefiniteProjection, SoftSort, definite_projection
from .fdconv import FDConv
from .fuse import fuse_for_inference
from .grkan import GRKAN, GroupRational
from .grouped_linear import GroupedLinear, grouped_linear
from .isotropic import Isotropic, resize_pos_embed
from .kan import KAN, channel_mixer
from .mlstm import MLSTMMixer
from .nc_ssd import NCSSD
from .norm import GroupedLayerNorm, RMSNorm
from .omni_shift import OmniShift
from .padding import zero_pad
from .plugins import (
    SCSE,
    ChannelPatchEmbed,
    TVConv,
    WaRA,
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    sample_channels,
)
from .pyramid import Pyramid, Stage
from .rwkv import ChannelMix, RWKVBlock, SpatialMix, SpatialMix6, SpatialMix7, q_shift
from .s4 import LSSL, S4, S4D, S4ND
from .s5 import S5, ConvS5, ConvS5Layer, S5Mixer
from .s6 import S6
from .ss2d import SS2D
from .token_mixer import TokenMixer
from .vim_mixer import CausalConv, VimBlock, VimMixer

__all__ = [
    "GRKAN",
    "KAN",
    "LSSL",
    "NCSSD",
    "S4",
    "S4D",
    "S4ND",
    "S5",
    "S6",
    "SCSE",
    "SS2D",
    "CausalConv",
    "ChannelGate",
    "ChannelMix",
    "ChannelPatchEmbed",
    "Conv2dNHWC",
    "ConvDownsample",
    "ConvS5",
    "ConvS5Layer",
    "DefiniteProjection",
    "FDConv",
    "GroupRational",
    "GroupedLayerNorm",
    "GroupedLinear",
    "Isotropic",
    "OmniShift",
    "Pyramid",
    "RMSNorm",
    "RWKVBlock",
    "S5Mixer",
    "SoftSort",
    "SpatialMix",
    "SpatialMix6",
    "SpatialMix7",
    "TokenMixer",
    "MLSTMMixer",
    "Stage",
    "TVConv",
    "VimBlock",
    "VimMixer",
    "WaRA",
    "WeightedAverage",
    "WeightedConv1d",
    "WeightedConv2d",
    "WeightedConv3d",
    "channel_mixer",
    "definite_projection",
    "fuse_for_inference",
    "grouped_linear",
    "q_shift",
    "resize_pos_embed",
    "sample_channels",
    "unwrap_state_dict",
    "zero_pad",
]
