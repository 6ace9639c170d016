"""Importing this package registers every model of the zoo with timm."""

from timm import list_models as _timm_list_models

from .convs5 import ConvS5Video
from .efficientvmamba import EfficientVMamba
from .fs_rwkv import FSRWKV
from .groupmamba import GroupMamba
from .hrvmamba import HRVMamba
from .kat import KAT
from .localmamba import LocalVim, LocalVMamba
from .occrwkv import OccRWKV
from .restore_rwkv import RestoreRWKV
from .rwkvsam import RWKVSAM
from .rwkvsam_backbone import RWKVSAMBackbone
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
    "RWKVSAM",
    "VRWKV",
    "VRWKV6",
    "VRWKVAdapter",
    "VSSD",
    "ConvS5Video",
    "EfficientVMamba",
    "FSRWKV",
    "GroupMamba",
    "HRVMamba",
    "LocalVMamba",
    "LocalVim",
    "OccRWKV",
    "PixelS4D",
    "PixelS5",
    "RWKVSAMBackbone",
    "RestoreRWKV",
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
    "rwkvsam_backbone",
    "s4",
    "s4nd",
    "spatialmamba",
    "vim",
    "vim2",
    "vmamba",
    "vrwkv",
    "vssd",
)
_OTHER_FAMILIES = {
    "adopted": ("efficientvim",),
    "pyramid": ("vrwkv_adapter",),
    "segmentation": ("vm_unet",),
    "restoration": ("fs_rwkv", "restore_rwkv"),
    "promptable": ("rwkvsam",),
    "occupancy": ("occrwkv",),
}


def list_models(filter="", kind="backbone"):
    """Names of the zoo's models, sorted.

    Args:
        filter: Wildcard pattern or a list of them, as in `timm.list_models`.
        kind: "backbone"; "adopted" for backbones of linear complexity that timm itself registers; "pyramid" for
            backbones that give maps alone; "segmentation" for models whose output is mask logits; "restoration" for
            those whose output is the restored image; "promptable" for those whose masks are of what points and boxes
            ask for; "occupancy" for those that take voxels and tell their classes.

    Raises:
        ValueError: `kind` is none of these.
    """
    kinds = {"backbone": _FAMILIES, **_OTHER_FAMILIES}
    if kind not in kinds:
        raise ValueError(f"kind: expected one of {', '.join(kinds)}, got {kind!r}")
    return sorted({name for family in kinds[kind] for name in _timm_list_models(filter, module=family)})
