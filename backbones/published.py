"""What the authors publish about each variant, in one table; `tools/models.py` sets what we measure beside it."""

from typing import NamedTuple


class Published(NamedTuple):
    """Figures as printed by the authors, rounded as they round them.

    Attributes:
        params_m: Parameters in millions.
        gmacs: Multiply-accumulates of one image at `size`, in 10^9; papers mostly call them FLOPs.
        top1: ImageNet-1K top-1 accuracy in percent.
        source: Where the figures stand.
        size: Side of the square image that `gmacs` and `top1` refer to.
        note: Why a figure differs by more than 3 % from what we measure; empty where none does.
    """

    params_m: float | None
    gmacs: float | None
    top1: float | None
    source: str
    size: int = 224
    note: str = ""


_GROUPMAMBA = "README and project page of github.com/Amshaker/GroupMamba"

PUBLISHED = {
    "groupmamba_t": Published(23, 4.6, 83.3, _GROUPMAMBA),
    "groupmamba_s": Published(
        34, 7.0, 83.9, _GROUPMAMBA, note="the authors' own code, counted by our rules, has 7.23 GMACs"
    ),
    "groupmamba_b": Published(57, 14, 84.5, _GROUPMAMBA),
}
