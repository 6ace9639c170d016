"""Scan orders are permutations, and walk as their names say."""

import pytest
import torch

from linzoo.ops import scan_order as so

SIZES = [(1, 1), (1, 5), (4, 4), (3, 7), (8, 6)]
SINGLE = {
    "raster": so.raster,
    "column": so.column,
    "snake": so.snake,
    "diagonal": so.diagonal,
    "hilbert": so.hilbert,
    "zigzag": so.zigzag,
    "spiral": so.spiral,
    "windowed": lambda H, W: so.windowed(H, W, 2),
    "windowed_oblong": lambda H, W: so.windowed(H, W, (2, 3)),
    "reverse": lambda H, W: so.reverse(so.snake(H, W)),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("size", SIZES)
def test_every_token_once(name, size):
    order = SINGLE[name](*size)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(size[0] * size[1]))


def test_small_examples():
    assert so.raster(2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert so.column(2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert so.snake(2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert so.diagonal(2, 3).tolist() == [0, 1, 3, 2, 4, 5]
    assert so.zigzag(3, 4).tolist() == [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]
    assert so.spiral(3, 4).tolist() == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]
    assert so.windowed(2, 5, 2).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]
    assert so.cross(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert so.atrous(2, 4, 2).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_volumes():
    """SegMamba's third walk goes through the depth at each place; runs need not be slices."""
    assert so.slices(12, 3).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    walks = so.volume(24, 4)
    assert walks.shape == (3, 24) and walks.dtype == torch.int32
    assert (walks.sort(-1).values == torch.arange(24)).all()
    assert torch.equal(walks[1], walks[0].flip(0)) and walks[2].tolist()[:4] == [0, 6, 12, 18]
    for chunks in (0, 5):
        with pytest.raises(ValueError, match=f"chunks: must divide the number of tokens, got {chunks} for 12"):
            so.slices(12, chunks)


def _steps(order, W):
    row, col = order.long() // W, order.long() % W
    return (row.diff().abs() + col.diff().abs()).tolist()


@pytest.mark.parametrize("side", (2, 4, 8, 16))
def test_hilbert_and_snake_walk_to_neighbours(side):
    assert set(_steps(so.hilbert(side, side), side)) == {1}
    assert set(_steps(so.snake(side, side + 1), side + 1)) == {1}
    assert set(_steps(so.spiral(side, side + 1), side + 1)) == {1}


def test_hilbert_stays_local():
    """Any 16 successive aligned steps fill one 4 x 4 square, unlike raster order."""
    order = so.hilbert(16, 16).long().view(-1, 16)
    row, col = order // 16, order % 16
    assert (row // 4).unique(dim=1).shape[1] == 1 or all(len((r // 4).unique()) == 1 for r in row)
    assert all(len((c // 4).unique()) == 1 for c in col)


def test_windows_are_visited_whole():
    order = so.windowed(6, 9, 3).long()
    window = (order // 9) // 3 * 3 + (order % 9) // 3
    assert window.view(6, 9).diff(dim=1).abs().sum() == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="step: .*got 2 for 3 x 4"):
        so.atrous(3, 4, 2)
    with pytest.raises(ValueError, match="window: .*got 0"):
        so.windowed(4, 4, 0)


def test_orders_trace_with_any_size():
    class Cross(torch.nn.Module):
        def forward(self, x):
            return so.cross(x.shape[-2], x.shape[-1]) + 0

    height, width = torch.export.Dim("H", min=2, max=64), torch.export.Dim("W", min=2, max=64)
    program = torch.export.export(Cross(), (torch.zeros(4, 6),), dynamic_shapes=({0: height, 1: width},))
    assert torch.equal(program.module()(torch.zeros(3, 5)), so.cross(3, 5))
