"""Importing this package registers every model of the zoo with timm."""

from timm import list_models as _timm_list_models

from .convs5 import ConvS5Video
from .efficientvmamba import EfficientVMamba
from .groupmamba import GroupMamba
from .hrvmamba import HRVMamba
from .kat import KAT
from .localmamba import LocalVim, LocalVMamba
from .s4 import PixelS4D, PixelS5
from .s4nd import S4NDConvNeXt
from .spatialmamba import SpatialMamba
from .vim import Vim
from .vim2 import ViM2
from .vm_unet import VMUNet
from .vmamba import VMamba
from .vrwkv import VRWKV, VRWKV6
from .vrwkv_adapter import VRWKVAdapter
from .vssd import VSSD

__all__ = [
    "KAT",
    "VRWKV",
    "VRWKV6",
    "VRWKVAdapter",
    "VSSD",
    "ConvS5Video",
    "EfficientVMamba",
    "GroupMamba",
    "HRVMamba",
    "LocalVMamba",
    "LocalVim",
    "PixelS4D",
    "PixelS5",
    "S4NDConvNeXt",
    "SpatialMamba",
    "VMUNet",
    "VMamba",
    "ViM2",
    "Vim",
    "list_models",
]

_FAMILIES = (
    "efficientvmamba",
    "groupmamba",
    "hrvmamba",
    "kat",
    "localmamba",
    "s4",
    "s4nd",
    "spatialmamba",
    "vim",
    "vim2",
    "vmamba",
    "vrwkv",
    "vssd",
)
_DENSE_FAMILIES = ("vm_unet",)
_ADOPTED_FAMILIES = ("efficientvim",)  # of linear complexity, and in timm already


def list_models(filter="", dense=False, adopted=False):
    """Names of the zoo's models, sorted.

    Args:
        filter: Wildcard pattern or a list of them, as in `timm.list_models`.
        dense: The models whose output is a map (mask logits) instead of the backbones.
        adopted: The models that timm itself registers instead.
    """
    families = _DENSE_FAMILIES if dense else _ADOPTED_FAMILIES if adopted else _FAMILIES
    return sorted({name for family in families for name in _timm_list_models(filter, module=family)})
