"""Importing this package registers every model of the zoo with timm."""

from timm import list_models as _timm_list_models

from .groupmamba import GroupMamba
from .vmamba import VMamba

__all__ = ["GroupMamba", "VMamba", "list_models"]

_FAMILIES = ("groupmamba", "vmamba")


def list_models(filter=""):
    """Names of the zoo's models, sorted; `filter` is a wildcard pattern or a list of them, as in `timm.list_models`."""
    return sorted({name for family in _FAMILIES for name in _timm_list_models(filter, module=family)})
