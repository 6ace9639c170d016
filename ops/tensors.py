"""Checks that all operators share: dtypes, and shapes by named axes."""

import os

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the states and sums for activations of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promote(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of `tensors`."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def dense_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis, as the kernels need it; the other axes may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check(**named: tuple[Tensor | None, str]) -> dict:
    """Checks tensors given as ``name=(tensor, axes)``; the first tensor with an axis sets its size for the others.

    An axis is a letter, with the size of the first tensor that has it, or a digit, which is its size. "*" is any number
    of axes. The batch, "B", may be empty; other axes may not. ``order=(tensor, "GT")`` is a scan order: integers, with
    or without an axis B in front, of T <= L steps; ``"GL"`` requires as many steps as tokens. A tensor that is None is
    skipped.

    Returns:
        The size of every axis; for "*", a tuple of sizes.

    Raises:
        TypeError: not a tensor, or of an unsupported dtype.
        ValueError: a shape does not fit, an axis is empty, or tensors lie on different devices.
    """
    sizes, first = {}, None
    for name, (tensor, axes) in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor ({_text(axes)}), got {type(tensor).__name__}")
        if name == "order":
            _check_order(tensor, axes, sizes)
        else:
            _check_shape(name, tensor, axes, sizes)
        if tensor.dtype not in (INTEGERS if name == "order" else FLOATS):
            expected = "int32 or int64" if name == "order" else "float64, float32, bfloat16 or float16"
            raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ValueError(f"{name}: expected on {first[1]} as {first[0]}, got {tensor.device}")
    return sizes


def check_entries(order: Tensor | None, length: int) -> None:
    """RuntimeError if a scan order has entries out of range or repeats a token; only under ``LINZOO_DEBUG=1``."""
    if order is None or os.environ.get("LINZOO_DEBUG") != "1":
        return
    if order.min() < 0 or order.max() >= length:
        raise RuntimeError(f"order: every entry must lie in [0, {length}), got {order.min()} to {order.max()}")
    ordered = order.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise RuntimeError("order: a group visits a token twice")


def _text(axes: str) -> str:
    """``"BL*2"`` is ``"B, L, ..., 2"``, ``"T"`` is ``"T,"``."""
    return ", ".join("..." if axis == "*" else axis for axis in axes) + "," * (len(axes) == 1)


def _check_shape(name: str, tensor: Tensor, axes: str, sizes: dict) -> None:
    shape, plain = tuple(tensor.shape), axes
    if "*" in axes and len(shape) >= len(axes) - 1:  # one axis for all that "*" stands for
        at, count = axes.index("*"), len(shape) - len(axes) + 1
        shape = (*shape[:at], shape[at : at + count], *shape[at + count :])
    elif len(shape) != len(axes):
        plain = ""
    for axis, size in zip(plain, shape, strict=False):
        if axis not in sizes:
            sizes[axis] = int(axis) if axis.isdigit() else size
        if sizes[axis] != size:
            plain = ""
        elif axis not in "B*" and size == 0:
            raise ValueError(f"{name}: every size but the batch must be positive, got {tuple(tensor.shape)}")
    if not plain:
        known = ""
        if all(axis in sizes for axis in axes):
            known = f" = {tuple(x for axis in axes for x in (sizes[axis] if axis == '*' else (sizes[axis],)))}"
        raise ValueError(f"{name}: expected ({_text(axes)}){known}, got {tuple(tensor.shape)}")


def _check_order(order: Tensor, axes: str, sizes: dict) -> None:
    shape, length, whole = tuple(order.shape), sizes["L"], axes[-1] == "L"
    rows = tuple(sizes[axis] for axis in axes[:-1])
    if (
        shape[:-1] in (rows, (sizes["B"], *rows))
        and shape
        and (shape[-1] == length or 0 < shape[-1] < length and not whole)
    ):
        return
    known = ", ".join(f"{axis} = {sizes[axis]}" for axis in "B" + axes[:-1])
    bound = "L" if whole else f"0 < {axes[-1]} <= L"
    batched = ", ".join("B" + axes)
    raise ValueError(f"order: expected ({_text(axes)}) or ({batched}) with {known}, {bound} = {length}, got {shape}")
