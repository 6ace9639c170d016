"""Importing this package registers every model of the zoo with timm."""

from timm import list_models as _timm_list_models

from .efficientvmamba import EfficientVMamba
from .groupmamba import GroupMamba
from .vim import Vim
from .vmamba import VMamba

__all__ = ["EfficientVMamba", "GroupMamba", "VMamba", "Vim", "list_models"]

_FAMILIES = ("efficientvmamba", "groupmamba", "vim", "vmamba")


def list_models(filter=""):
    """Names of the zoo's models, sorted; `filter` is a wildcard pattern or a list of them, as in `timm.list_models`."""
    return sorted({name for family in _FAMILIES for name in _timm_list_models(filter, module=family)})
