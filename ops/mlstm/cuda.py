"""Arguments and grids of the kernels in cuda.cu."""

import torch

from .. import compile_cuda as cuda

NAME = "mlstm"
STEPS, WIDE = 64, 48  # of a chunk; columns and rows of a state that a block has
MAXIMUM, MAXIMUM_BACKWARD, THROUGH_H = "maximum<8>", "maximum_backward<8>", "through_h<4>"


def unsupported(q):
    """Why the kernels do not take `q`, or None: they multiply in tf32, two for a float32."""
    if q.dtype != torch.float32:
        return f"the CUDA kernel computes in float32, got {q.dtype}"
    return None if cuda.has_tf32(q.device) else "the CUDA kernel needs a GPU of compute capability 8.0 or more"


def _sizes(q):
    _, L, H, P = q.shape
    return dict(L=L, H=H, P=P), -(-P // WIDE), -(-L // STEPS)


def _gates(q, i, f, m):
    """Writes m; the sums of the decays' logarithms from the start of each chunk, and the weights of the keys."""
    sizes, *_ = _sizes(q)
    since, beta = torch.empty_like(i, dtype=torch.float64), torch.empty_like(i)
    cuda.launch(NAME, MAXIMUM, i.shape[0] * i.shape[2], 32, i=i, f=f, **sizes, m=m, since=since, beta=beta)
    return dict(since=since, beta=beta)


def _carry(x, z, width, *, backward, factor, extra, since):
    """The states before the chunks, or the adjoints of those after them ``(B, H, chunks, P + 1, P)``."""
    (B, _, H, P), (sizes, tiles, chunks) = x.shape, _sizes(x)
    states = x.new_empty(B, H, chunks, P + 1, P)
    name, rest = cuda.template("carry", backward, width), dict(since=since, factor=factor, extra=extra)
    cuda.launch(NAME, name, B * H * tiles**2, 96, x=x, z=z, **rest, **sizes, tiles=tiles, states=states)
    return states


OUT = {"kRead": 0, "kToQ": 1, "kToK": 2, "kToV": 3}


def _apply(out, x, y, z, width, states, weights, *, own=None, m=None, denominator=None, eps=0.0):
    """Returns what is asked for, and its products with `own`. `weights`: since and beta, backward scale and extra."""
    (B, L, H, _), (sizes, tiles, chunks) = x.shape, _sizes(x)
    result = x.new_empty(x.shape)
    sums = None if own is None else x.new_empty(2, tiles, B, L, H)
    rest = dict(own=own, m=m, denominator=denominator, eps=eps, B=B, tiles=tiles, sums=sums, states=states)
    rest |= dict(scale=None, extra=None) | weights
    name, grid = cuda.template("apply", OUT[out], width), B * H * chunks * tiles
    cuda.launch(NAME, name, grid, cuda.MAX_THREADS, x=x, y=y, z=z, **rest, **sizes, out_=result)
    return result, sums


def forward(*, q, k, v, i, f, eps, m, denominator):
    """Returns h; writes m and, unless it is None, n . q."""
    width = cuda.vector(4, q, k, v)
    gates = _gates(q, i, f, m)
    states = _carry(k, v, width, backward=False, factor=gates["beta"], extra=None, since=gates["since"])
    return _apply("kRead", q, k, v, width, states, gates, m=m, denominator=denominator, eps=eps)[0]


def backward(*, dh, q, k, v, i, f, eps, h, m, denominator):
    """The gradients of q, k, v, i and f."""
    B, L, H, P = q.shape
    width, (sizes, tiles, chunks) = cuda.vector(4, dh, q, k, v), _sizes(q)
    scale, extra, dm, dg, di, df = (torch.empty_like(i) for _ in range(6))
    grid, rows = -(-i.numel() // 4), dict(scale=scale, extra=extra)
    read = dict(dh=dh, h=h, m=m, denominator=denominator, B=B, eps=eps, dm=dm)
    cuda.launch(NAME, THROUGH_H, grid, cuda.MAX_THREADS, **read, **sizes, **rows)

    gates = _gates(q, i, f, torch.empty_like(m))
    since, beta = gates["since"], gates["beta"]
    states = _carry(k, v, width, backward=False, factor=beta, extra=None, since=since)
    adjoints = _carry(q, dh, width, backward=True, factor=scale, extra=extra, since=since)
    weights = gates | rows
    dq, of_q = _apply("kToQ", dh, v, k, width, states, weights, own=q)
    dk, of_k = _apply("kToK", v, dh, q, width, adjoints, weights, own=k)
    dv, _ = _apply("kToV", k, q, dh, width, adjoints, weights)
    given = dict(q=q, k=k, v=v, dh=dh, states=states, adjoints=adjoints, of_q=of_q, of_k=of_k, B=B, tiles=tiles)
    name = cuda.template("gates", width)
    cuda.launch(NAME, name, B * H * chunks, cuda.MAX_THREADS, **given, **weights, **sizes, dg=dg, di=di)
    named = dict(dm=dm, dg=dg, i=i, f=f, m=m, L=L, H=H, di=di, df=df)
    cuda.launch(NAME, MAXIMUM_BACKWARD, B * H, 32, **named)
    return [dq, dk, dv, di, df]
