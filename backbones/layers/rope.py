"""Rotary position embeddings for the tokens of a map."""

import torch
from torch import Tensor


def axial_angles(rows: Tensor, columns: Tensor, pairs: int, theta: float = 10000.0) -> Tensor:
    """Angles ``(H, W, 2 pairs)`` for the channel pairs of a map: the first half turns with the row, the second with
    the column.

    Pair i of either half turns by ``theta ** (-i / pairs)`` times its position, given by `rows` ``(H,)`` or `columns`
    ``(W,)``.
    """
    frequency = theta ** (-torch.arange(pairs, dtype=rows.dtype, device=rows.device) / pairs)
    grid = (rows.shape[0], columns.shape[0], pairs)
    row, column = (rows[:, None] * frequency)[:, None], columns[:, None] * frequency
    return torch.cat([row.expand(grid), column.expand(grid)], 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels of ``(..., C)`` by angles, given as cosines and sines ``(..., C / 2)``."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
