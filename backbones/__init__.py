"""Importing this package registers every model of the zoo with timm."""

from typing import Literal

from timm import is_model as _is_model
from timm import list_models as _timm_list_models
from timm.models import model_entrypoint as _model_entrypoint

from .convs5 import ConvS5Video
from .dimsum import DiMSUM
from .efficientvmamba import EfficientVMamba
from .fs_rwkv import FSRWKV
from .gdkvm import GDKVM
from .groupmamba import GroupMamba
from .hrvmamba import HRVMamba
from .kat import KAT
from .localmamba import LocalVim, LocalVMamba
from .mambair import MambaIR
from .mambair_opensr import OpenSRMamba
from .mambair_v2 import MambaIRv2
from .mambavision import MambaVision
from .mila import MILA
from .mvar import MVAR
from .mvar_tokenizer import MVARTokenizer
from .occrwkv import OccRWKV
from .plain import PlainMixer
from .plainmamba import PlainMamba
from .restore_rwkv import RestoreRWKV
from .rgt import RGT
from .rwkvsam import RWKVSAM
from .rwkvsam_backbone import RWKVSAMBackbone
from .s4 import PixelS4D, PixelS5
from .s4nd import S4NDConvNeXt
from .segmamba import SegMamba
from .spatialmamba import SpatialMamba
from .swin_umamba import SwinUMamba, SwinUMambaD
from .terminator import Terminator
from .tsm2 import TSM2
from .umamba import UMamba
from .umamba_3d import umamba_bot_3d as _umamba_bot_3d  # noqa: F401  registers the 3-D ones
from .vfimamba import VFIMamba
from .videomamba import VideoMamba
from .videomamba_video import VideoMambaVideo
from .vil import ViL
from .vim import Vim
from .vim2 import ViM2
from .vm_unet import VMUNet
from .vmamba import VMamba
from .vrwkv import VRWKV, VRWKV6
from .vrwkv_adapter import VRWKVAdapter
from .vssd import VSSD

__all__ = [
    "GDKVM",
    "KAT",
    "MILA",
    "MVAR",
    "RGT",
    "RWKVSAM",
    "TSM2",
    "VRWKV",
    "VRWKV6",
    "VRWKVAdapter",
    "VSSD",
    "ConvS5Video",
    "DiMSUM",
    "EfficientVMamba",
    "FSRWKV",
    "GroupMamba",
    "HRVMamba",
    "LocalVMamba",
    "LocalVim",
    "MambaVision",
    "MambaIR",
    "MambaIRv2",
    "MVARTokenizer",
    "OccRWKV",
    "OpenSRMamba",
    "PixelS4D",
    "PixelS5",
    "PlainMamba",
    "PlainMixer",
    "RWKVSAMBackbone",
    "RestoreRWKV",
    "S4NDConvNeXt",
    "SpatialMamba",
    "SwinUMamba",
    "SwinUMambaD",
    "SegMamba",
    "Terminator",
    "UMamba",
    "VFIMamba",
    "VMUNet",
    "VMamba",
    "ViL",
    "ViM2",
    "VideoMamba",
    "VideoMambaVideo",
    "KINDS",
    "Vim",
    "kind_of",
    "list_models",
]

Kind = Literal[
    "backbone",
    "adopted",
    "pyramid",
    "segmentation",
    "restoration",
    "promptable",
    "occupancy",
    "video",
    "volume",
    "tracking",
    "interpolation",
    "generation",
    "fixed",
    "forecasting",
]

_FAMILIES: dict[Kind, tuple[str, ...]] = {
    "backbone": (
        "efficientvmamba",
        "groupmamba",
        "hrvmamba",
        "kat",
        "localmamba",
        "mambavision",
        "mila",
        "plain",
        "plainmamba",
        "rwkvsam_backbone",
        "s4",
        "s4nd",
        "spatialmamba",
        "videomamba",
        "vil",
        "vim",
        "vim2",
        "vmamba",
        "vrwkv",
        "vssd",
    ),
    "adopted": ("efficientvim",),
    "pyramid": ("vrwkv_adapter",),
    "segmentation": ("swin_umamba", "umamba", "vm_unet"),
    "restoration": ("fs_rwkv", "mambair", "mambair_opensr", "mambair_v2", "restore_rwkv", "rgt"),
    "promptable": ("rwkvsam",),
    "occupancy": ("occrwkv",),
    "video": ("convs5", "videomamba_video"),
    "volume": ("segmamba", "umamba_3d"),
    "tracking": ("gdkvm",),
    "interpolation": ("vfimamba",),
    "generation": ("dimsum", "mvar", "mvar_tokenizer"),
    "fixed": ("terminator",),
    "forecasting": ("tsm2",),
}
KINDS: tuple[Kind, ...] = tuple(_FAMILIES)


def list_models(filter: str | list[str] = "", kind: Kind | None = "backbone") -> list[str]:
    """Names of the zoo's models, sorted.

    Args:
        filter: Wildcard pattern or a list of them, as in `timm.list_models`.
        kind: "backbone"; "adopted" for backbones of linear complexity that timm itself registers; "pyramid" for
            backbones that only return maps; "segmentation" for models that return mask logits; "restoration" for models
            that return the restored image; "promptable" for models that return masks for points and boxes;
            "occupancy" for models of voxels; "video" for models of clips; "volume" for models that segment volumes;
            "tracking" for models that segment clips, frame by frame;
            "interpolation" for models that insert frames between two;
            "generation" for models that generate images, and for their tokenizers;
            "fixed" for classifiers of square images of one size, whose outputs depend on the batch;
            "forecasting" for models of time series.
            None for all of them.

    Raises:
        ValueError: there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    families = [family for k in KINDS if kind in (k, None) for family in _FAMILIES[k]]
    return sorted({name for family in families for name in _timm_list_models(filter, module=family)})


def kind_of(name: str) -> Kind | None:
    """The kind of a registered model, as in `list_models`; None for a model outside the zoo."""
    if not _is_model(name):
        return None
    family = _model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]
    return next((kind for kind, families in _FAMILIES.items() if family in families), None)


def _check_registration() -> None:
    """RuntimeError if a listed family registers no model, or an unlisted family registers models."""
    listed = {family for families in _FAMILIES.values() for family in families}
    for family in sorted(listed):
        if not _timm_list_models(module=family):
            raise RuntimeError(
                f"linzoo.backbones lists the family {family!r}, which registers no model; expected "
                f"`from .{family} import ...` here and `@register_model` on its variants"
            )
    for name in _timm_list_models():
        package, _, family = _model_entrypoint(name).__module__.rpartition(".")
        if package == __name__ and family not in listed:
            raise RuntimeError(f"{name!r} is registered, but linzoo.backbones does not list its family {family!r}")


_check_registration()
