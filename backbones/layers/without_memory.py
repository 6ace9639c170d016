"""Models on the meta device: shapes without values."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Unfilled", "without_memory"]

FILLS = {"add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_"}


class Unfilled(TorchFunctionMode):
    """Skips the initialisation of tensors on the meta device. They have no values, and its shape checks are slow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and getattr(func, "__name__", "") in FILLS and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Modules made in here lie on the meta device. They are not initialised, which would take most of the time."""
    with torch.device("meta"), Unfilled():
        yield
