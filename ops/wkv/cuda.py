"""Arguments and grids of the kernels in cuda.cu."""

from .. import cuda

NAME = "wkv"
MAX_CHANNELS = cuda.MAX_THREADS  # key or value channels of a head: a thread is a column of its state
CHUNK, MARKS = 16, 8  # of bi_wkv's segments; as in cuda.cu


def _order(order, steps):
    """The order, the distance of its rows, and the number of its steps."""
    if order is None:
        return None, 0, steps
    return order, 0 if order.dim() == 1 else order.stride(0), order.shape[-1]


def _rows(*tensors, dims):
    """Each tensor with the first `dims` of its strides; None with zeros."""
    return [v for x in tensors for v in (x, *((0,) * dims if x is None else x.stride()[:dims]))]


# --- bi_wkv


def bi_plan(k, steps):
    """Blocks of channels and their threads; segments of the steps and their length."""
    blocks, threads = cuda.channel_blocks(k.shape[2])
    segments, length = cuda.segments(steps, k.shape[0] * threads * blocks, k.device, least=32)
    if length > CHUNK * MARKS:
        length = CHUNK * MARKS
        segments = -(-steps // length)
    return blocks, threads, segments, length


def bi_forward(k, v, w, u, order, y, log_den):
    """Writes y and, unless it is empty, log_den."""
    _bi(k, v, None, w, u, order, y, log_den if log_den.numel() else None, None, None, None, None)


def bi_backward(dy, k, v, w, u, order, y, log_den, dk, dv, dw, du):
    """Writes dk, dv, and dw and du ``(B segments, C)``."""
    _bi(k, v, dy, w, u, order, y.contiguous(), log_den.contiguous(), dk, dv, dw, du)


def _bi(k, v, dy, w, u, order, y, log_den, *grads):
    batch, L, C = k.shape
    order, order_batch, steps = _order(order, L)
    blocks, threads, segments, length = bi_plan(k, steps)
    grid, backward, ends = batch * segments * blocks, dy is not None, None
    cut = steps, blocks, segments, length
    if segments > 1:
        ends = k.new_empty(2, batch, segments, 6 if backward else 4, C)
        terms = _rows(log_den, dy, dims=2) if backward else _rows(k, v, dims=2)
        arguments = *terms, y if backward else None, order, order_batch, w, batch, L, C, *cut, ends
        cuda.launch(NAME, cuda.template("bi_ends", k.dtype, backward), grid, threads, *arguments)
        carry_grid = -(-2 * batch * C // cuda.MAX_THREADS)
        name = cuda.template("bi_carry", k.dtype, backward)
        cuda.launch(NAME, name, carry_grid, cuda.MAX_THREADS, ends, w, batch, C, steps, segments, length)
    arguments = *_rows(k, v, dy, dims=2), order, order_batch, w, u, batch, L, C, *cut, ends, y, log_den, *grads
    cuda.launch(NAME, cuda.template("bi_sweep", k.dtype, backward), grid, threads, *arguments)


# --- wkv6 and wkv7


def _threads(P):
    return -(-P // 32) * 32


def forward(r, w, k, v, a, b, u, order, directions, y, states):
    """Writes y ``(directions, B, L, H, P)`` and, unless it is empty, states."""
    batch, L, H, P = v.shape
    order, order_batch, steps = _order(order, L)
    name = cuda.template("forward", k.dtype, k.shape[3], a is not None)
    arguments = *_rows(r, w, k, v, a, b, dims=3), u, order, order_batch, batch, L, H, P, steps, y
    saved = states if states.numel() else None
    cuda.launch(NAME, name, directions * batch * H, _threads(P), *arguments, saved)


def backward(dy, r, w, k, v, a, b, u, order, directions, states, *grads):
    """Writes the gradients of r, w, k, v, a and b ``(directions, B, L, H, -)`` and u ``(directions, B, H, N)``."""
    batch, L, H, P = v.shape
    order, order_batch, steps = _order(order, L)
    N, tasks = k.shape[3], directions * batch * H
    grid = min(tasks, 4 * cuda.multiprocessors(k.device))
    history = k.new_empty(grid, CHUNK, N, P)
    name = cuda.template("backward", k.dtype, N, a is not None)
    grads = [g if g.numel() else None for g in grads]
    arguments = *_rows(dy, r, w, k, v, a, b, dims=3), u, order, order_batch, tasks, batch, L, H, P, steps
    cuda.launch(NAME, name, grid, _threads(P), *arguments, states, history, *grads)
