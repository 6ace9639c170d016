"""Scan orders: permutations of an image's tokens, passed to the operators as ``order``.

Every function takes the height and width of the token map and returns an int32 tensor. Its entry ``t`` is the raster
index ``row * W + column`` of the token visited at step ``t``. One order is ``(H * W,)``, several are ``(G, H * W)``.
All use only tensor operations, so they can be traced and work for any ``H`` and ``W``.
"""

import torch


def raster(H, W, device=None):
    """Row by row, each from left to right."""
    return torch.arange(H * W, dtype=torch.int32, device=device)


def column(H, W, device=None):
    """Column by column, each from top to bottom."""
    return raster(H, W, device).view(H, W).t().reshape(-1)


def reverse(order):
    """The same walk backwards."""
    return order.flip(-1)


def cross(H, W, device=None):
    """Cross-scan (VMamba, arXiv 2401.10166): raster, column, and both reversed; ``(4, H * W)``."""
    forth = torch.stack([raster(H, W, device), column(H, W, device)])
    return torch.cat([forth, reverse(forth)])


def snake(H, W, device=None):
    """Row by row, every second row from right to left, so that successive tokens are neighbours."""
    rows = raster(H, W, device).view(H, W)
    odd = torch.arange(H, device=device)[:, None] % 2 == 1
    return torch.where(odd, rows.flip(1), rows).reshape(-1)


def _by_keys(*keys):
    """Raster indices sorted by the first key, ties by the second and so on. Keys are integer maps ``(H, W)``."""
    order = torch.arange(keys[0].numel(), device=keys[0].device)
    for key in reversed(keys):
        order = order[torch.argsort(key.reshape(-1)[order], stable=True)]
    return order.to(torch.int32)


def _grid(H, W, device):
    return torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")


def windowed(H, W, window, device=None):
    """Window by window in raster order, raster order within each (LocalMamba, arXiv 2403.09338).

    `window` is a size or a pair (height, width). Windows that do not fit at the lower and right border are cut off.

    Raises:
        ValueError: a window size is below 1.
    """
    h, w = (window, window) if isinstance(window, int) else window
    if h < 1 or w < 1:
        raise ValueError(f"window: sizes must be at least 1, got {window}")
    row, col = _grid(H, W, device)
    return _by_keys(row // h, col // w, row, col)


def diagonal(H, W, device=None):
    """Anti-diagonal by anti-diagonal from the upper left corner, each from its upper right end down."""
    row, col = _grid(H, W, device)
    return _by_keys(row + col, row)


def zigzag(H, W, device=None):
    """Anti-diagonal by anti-diagonal, even ones upwards and odd ones downwards, as JPEG orders coefficients."""
    row, col = _grid(H, W, device)
    k = row + col
    return _by_keys(k, torch.where(k % 2 == 0, -row, row))


def spiral(H, W, device=None):
    """Clockwise inwards from the upper left corner, ring by ring."""
    row, col = _grid(H, W, device)
    ring = torch.minimum(torch.minimum(row, col), torch.minimum(H - 1 - row, W - 1 - col))
    top, left, bottom, right = ring, ring, H - 1 - ring, W - 1 - ring
    width, height = right - left, bottom - top
    step = torch.where(
        row == top,
        col - left,
        torch.where(
            col == right,
            width + row - top,
            torch.where(row == bottom, width + height + right - col, 2 * width + height + bottom - row),
        ),
    )
    return _by_keys(ring, step)


def hilbert(H, W, device=None):
    """Along Hilbert's curve of the smallest power-of-two square around the map. Tokens outside the map are skipped.

    Successive tokens are neighbours where H = W is a power of two.
    """
    row, col = _grid(H, W, device)
    x, y, distance = col.clone(), row.clone(), torch.zeros_like(row)
    side = 1 << max(max(H, W) - 1, 0).bit_length()
    half = side // 2
    while half > 0:  # one quadrant decision per level, from the coarsest
        right, lower = (x & half) > 0, (y & half) > 0
        distance += half * half * ((3 * right.long()) ^ lower.long())
        mirror = right & ~lower
        x, y = torch.where(mirror, half - 1 - (x & (half - 1)), x), torch.where(mirror, half - 1 - (y & (half - 1)), y)
        x, y = torch.where(lower, x, y), torch.where(lower, y, x)
        half //= 2
    return _by_keys(distance)


def atrous(H, W, step, device=None):
    """Every `step`-th token of every `step`-th row in raster order, one group per offset, ``step ** 2`` in all.

    Group ``i * step + j`` starts at row i and column j (EfficientVMamba, arXiv 2403.09977, section 3.2).
    Returns ``(step ** 2, H * W / step ** 2)``: shorter than the map, since each group sees only its own tokens.

    Raises:
        ValueError: H or W is not a multiple of `step`.
    """
    if step < 1 or H % step or W % step:
        raise ValueError(f"step: must divide the map's sides, got {step} for {H} x {W}")
    grid = raster(H, W, device).view(H // step, step, W // step, step)
    return grid.permute(1, 3, 0, 2).reshape(step * step, -1)


def slices(length, chunks, device=None):
    """Cuts raster order into `chunks` equal runs; visits token j of each, then j + 1 (SegMamba, arXiv 2401.13560).

    With one chunk per slice of a volume ``(D, H, W)``, this walks through the depth at each place of a slice in turn.
    Returns ``(length,)``.

    Raises:
        ValueError: `length` is not a multiple of `chunks`.
    """
    if chunks < 1 or length % chunks:
        raise ValueError(f"chunks: must divide the number of tokens, got {chunks} for {length}")
    return torch.arange(length, dtype=torch.int32, device=device).view(chunks, -1).t().reshape(-1)


def volume(length, chunks, device=None):
    """The three walks of SegMamba (arXiv 2401.13560): forwards, backwards and through the `slices`; ``(3, length)``."""
    forth = torch.arange(length, dtype=torch.int32, device=device)
    return torch.stack([forth, reverse(forth), slices(length, chunks, device)])


def interleaved(H, W, device=None):
    """Two maps of one size, taking tokens in turns (VFIMamba, arXiv 2407.02315): ``(4, 2 * H * W)``.

    Token indices count the first map, then the second. The routes over the pixels are those of `cross`. At each pixel
    the first map's token comes first; in reversed routes the second map's token does.
    """
    forth = cross(H, W, device)[:2]
    pairs = torch.stack([forth, forth + H * W], -1).flatten(1)
    return torch.cat([pairs, reverse(pairs)])


def interleaved_places(H, W, device=None):
    """The token that receives the result of each step of `interleaved`, as in VFIMamba's code.

    On routes along rows it is the token that the step visits. On routes along columns, each half of the sequence is
    put back by itself as a transposed ``W x H`` image, although a half holds both maps for half of the columns. The
    published weights were trained that way.
    """
    rows = interleaved(H, W, device)[0]
    halves = torch.arange(2 * H * W, device=device).view(2, H, W).transpose(1, 2).reshape(-1)
    both = torch.stack([rows, rows[halves]])
    return torch.cat([both, reverse(both)])
