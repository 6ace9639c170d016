"""Arguments and grids of the kernels in cuda.cu."""

import torch

from .. import compile_cuda as cuda

NAME = "wkv"
MAX_CHANNELS = cuda.MAX_THREADS  # key or value channels per head: a thread holds a column of its state


def _steps(order, length):
    """The order, the stride between its rows, and the number of its steps."""
    return cuda.order_arguments(order, 1) | dict(steps=length if order is None else order.shape[-1])


# --- bi_wkv


def bi_plan(k, steps):
    """Blocks of channels and their threads; segments of steps and their length."""
    blocks, threads = cuda.channel_blocks(k.shape[2])
    segments, length = cuda.segments(steps, k.shape[0] * threads * blocks, k.device, least=32)
    if length > cuda.CHUNK * cuda.MARKS:
        length = cuda.CHUNK * cuda.MARKS
        segments = -(-steps // length)
    return blocks, threads, segments, length


def bi_forward(*, k, v, w, u, order, y, scale):
    """Writes y and, unless it is empty, scale."""
    scale = scale if scale.numel() else None
    _bi(k, None, w, order, first=k, second=v, v=v, u=u, y=y, scale=scale, dk=None, dv=None, dw=None, du=None)


def bi_backward(*, dy, k, v, w, u, order, y, scale, dk, dv, dw, du):
    """Writes dk, dv, and dw and du ``(B segments, C)``."""
    y, scale = y.contiguous(), scale.contiguous()
    _bi(k, dy, w, order, first=scale, second=dy, v=v, u=u, y=y, scale=scale, dk=dk, dv=dv, dw=dw, du=du)


def _bi(k, dy, w, order, *, first, second, y, **tensors):
    B, L, C = k.shape
    steps = _steps(order, L)
    blocks, threads, segments, segment_steps = bi_plan(k, steps["steps"])
    grid, backward, ends = (B * segments * blocks, threads), dy is not None, None
    cut = dict(segments=segments, segment_steps=segment_steps)
    sizes = steps | cut | dict(w=w, B=B, L=L, C=C, blocks=blocks)
    if segments > 1:
        ends = k.new_empty(2, B, segments, 6 if backward else 4, C)
        read = dict(first=first, second=second, y=y if backward else None)
        cuda.launch(NAME, cuda.template("bi_ends", k.dtype, backward), *grid, **read, **sizes, ends=ends)
        name, carry_grid = cuda.template("bi_carry", k.dtype, backward), -(-2 * B * C // cuda.MAX_THREADS)
        cuda.launch(NAME, name, carry_grid, cuda.MAX_THREADS, ends=ends, w=w, B=B, C=C, steps=steps["steps"], **cut)
    name = cuda.template("bi_sweep", k.dtype, backward)
    cuda.launch(NAME, name, *grid, k=k, dy=dy, y=y, ends=ends, **sizes, **tensors)


# --- wkv6 and wkv7


def _threads(P):
    return -(-P // 32) * 32


def on_tensor_cores(k, v):
    """Whether the kernels for tensor cores serve a call: in float32 with as many keys as values, 16, 32 or 64.

    The others go step by step. tf32 needs sm_80.
    """
    fits = k.dtype == torch.float32 and k.shape[3] == v.shape[3] and k.shape[3] in (16, 32, 64)
    return fits and cuda.has_tf32(k.device)


def forward(*, r, w, k, v, a, b, u, order, directions, y, states):
    """Writes y ``(directions, B, L, H, P)`` and, unless it is empty, states."""
    B, L, H, P = v.shape
    tasks = directions * B * H
    sizes = _steps(order, L) | dict(B=B, L=L, H=H)
    tensors = dict(r=r, w=w, k=k, v=v, y=y, states=states if states.numel() else None)
    if on_tensor_cores(k, v):
        name, own = ("forward6", dict(u=u)) if a is None else ("forward7", dict(a=a, b=b))
        cuda.launch(NAME, cuda.template(name, P), tasks, 2 * P, **tensors, **own, **sizes)
    else:
        name = cuda.template("forward", k.dtype, k.shape[3], a is not None)
        cuda.launch(NAME, name, tasks, _threads(P), **tensors, a=a, b=b, u=u, **sizes, P=P)


def backward(*, dy, r, w, k, v, a, b, u, order, directions, states, **grads):
    """Writes the gradients of r, w, k, v, a and b ``(directions, B, L, H, -)`` and u ``(directions, B, H, N)``."""
    B, L, H, P = v.shape
    N, tasks = k.shape[3], directions * B * H
    sizes = _steps(order, L) | dict(B=B, L=L, H=H)
    tensors = dict(dy=dy, r=r, w=w, k=k, v=v, states=states)
    if on_tensor_cores(k, v):
        name, own = ("backward6", dict(u=u)) if a is None else ("backward7", dict(a=a, b=b))
        grads = {f"d{x}": grads[f"d{x}"] for x in ("r", "w", "k", "v", *own)}
        cuda.launch(NAME, cuda.template(name, N), tasks, 2 * N, **tensors, **own, **sizes, **grads)
        return
    grid = min(tasks, 4 * cuda.multiprocessors(k.device))
    name = cuda.template("backward", k.dtype, N, a is not None)
    kept = 8 if k.element_size() * N > 512 else 4  # states of a chunk that `history` in cuda.cu holds
    history = k.new_empty(grid, kept, -(-N // 16) * 16, _threads(P))
    grads = {name: g if g.numel() else None for name, g in grads.items()}
    cuda.launch(
        NAME, name, grid, _threads(P), **tensors, a=a, b=b, u=u, **sizes, P=P, tasks=tasks, history=history, **grads
    )
