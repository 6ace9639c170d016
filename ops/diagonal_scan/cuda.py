"""Arguments and grids of the kernels in cuda.cu."""

import torch

from .. import compile_cuda as cuda

NAME = "diagonal_scan"


def scan(a, b, initial, reverse, h, *, conjugate=False, shift=0):
    """Writes h ``(B, L, M, 2)``, in its own dtype: the recurrence with the gain of step ``t + shift`` at step t."""
    batch, L, M, _ = b.shape
    constant = a.dim() == 2
    segments, length = cuda.segments(L, batch * M, b.device, least=32)
    grid, carry_grid = (-(-n // cuda.MAX_THREADS) for n in (batch * segments * M, batch * M))
    sizes = dict(B=batch, M=M, segments=segments)
    arguments = sizes | dict(gains=a, shift=shift, conjugate=conjugate, b=b, initial=initial, reverse=reverse)
    arguments |= dict(L=L, segment_steps=length)
    boundary = None
    if segments > 1:
        boundary, products = (a.new_empty(batch, segments, M, 2) for _ in range(2))
        name, ends = cuda.template("scan", b.dtype, h.dtype, a.dtype, constant, True), dict(boundary=boundary)
        ends["products"] = products
        cuda.launch(NAME, name, grid, cuda.MAX_THREADS, **arguments, **ends, h=None)
        name = cuda.template("carry", a.dtype)
        cuda.launch(NAME, name, carry_grid, cuda.MAX_THREADS, **sizes, **ends, initial=initial)
    name = cuda.template("scan", b.dtype, h.dtype, a.dtype, constant, False)
    cuda.launch(NAME, name, grid, cuda.MAX_THREADS, **arguments, boundary=boundary, products=None, h=h)


def backward(dh, a, h, initial, reverse):
    """Gradients of a, b and initial (None if that is None). All but b's are in the dtype of `a`."""
    g = h.new_empty(h.shape, dtype=a.dtype)
    scan(a, dh, None, not reverse, g, conjugate=True, shift=-1 if reverse else 1)
    start = a.new_zeros(h[:, :1].shape) if initial is None else initial.unsqueeze(1)
    before = torch.cat([h[:, 1:].to(a.dtype), start] if reverse else [start, h[:, :-1].to(a.dtype)], 1)
    da = torch.stack(_times_conjugate(g, before), -1)
    first = -1 if reverse else 0
    dinitial = None
    if initial is not None:
        dinitial = torch.stack(_times_conjugate(g[:, first], a if a.dim() == 2 else a[:, first]), -1)
    return da.sum((0, 1)) if a.dim() == 2 else da, g.to(h.dtype), dinitial


def _times_conjugate(x, y):
    """``x conj(y)`` as (re, im)."""
    (xr, xi), (yr, yi) = x.unbind(-1), y.unbind(-1)
    return xr * yr + xi * yi, xi * yr - xr * yi
