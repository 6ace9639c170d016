"""Arguments and grids of the kernels in cuda.cu. Called like the CPU kernels."""

from typing import NamedTuple

import torch

from .. import compile_cuda as cuda

NAME = "selective_scan"
OWN = 4  # steps (and aligned channels) that a thread of a one-state kernel takes at once


def lanes(channels):
    """Threads of a one-state block that are neighbours along the channels: many, with few of them idle."""
    units = channels if channels % OWN else channels // OWN
    return min((32, 16, 8, 4), key=lambda n: -(-units // n) * (n + 3))  # 3: for what each block stages


def chunk(channels, states):
    """Steps between two saved states: the span that a one-state block walks at once."""
    return cuda.MAX_THREADS // lanes(channels) * OWN if states == 1 else cuda.CHUNK


def shared_memory(channels, states, rank, element, vector):
    """Bytes of shared memory of the backward kernel, which needs the most. Sums have `element` bytes."""
    if states > 1:
        rows = cuda.CHUNK * (2 * states + max(rank, 1)) + cuda.MAX_THREADS // 32 * 33 * (states + (rank + 1) // 2)
        return element * rows + 8 * cuda.CHUNK
    n, span = lanes(channels), chunk(channels, 1)
    width = n * vector
    rows = 2 * (rank + 2) * (span + 4) + (rank if rank and rank <= 24 else 1) * width
    rows += span * vector + (3 * span // OWN + span + (rank + 1 if rank <= 48 else 1)) * width
    return element * rows + 8 * span


def limit(u, A, dt_weight):
    """Why the kernels cannot scan these ranks and states, or None. A block has 48 KiB."""
    rank = 0 if dt_weight is None else dt_weight.shape[-1]
    element = 8 if u.dtype == torch.float64 else 4
    vector = 1 if u.shape[3] % OWN or element == 8 else OWN
    bytes_ = shared_memory(u.shape[3], A.shape[-1], rank, element, vector)
    if bytes_ <= 48 * 1024:
        return None
    return f"{A.shape[-1]} states of rank {rank} want {bytes_} bytes of a block's 49152 of shared memory on CUDA"


class Plan(NamedTuple):
    """How a scan is cut: blocks of channels and their threads, segments of steps and their length."""

    blocks: int
    threads: int
    segments: int
    segment_steps: int
    vector: int  # channels of a thread

    def template(self, kernel, u, A, dt_weight, *flags):
        """The instance of a kernel; with one state, of its one-state version."""
        rank = 0 if dt_weight is None else dt_weight.shape[1]
        if A.shape[1] > 1:
            return cuda.template(kernel, u.dtype, A.dtype, A.shape[1], rank, *flags)
        if kernel != "forward":
            kernel, flags = "backward", (*flags, kernel == "adjoint_ends")
        return cuda.template(f"{kernel}_one", u.dtype, A.dtype, rank, self.vector, lanes(u.shape[3]), *flags)


def plan(u, dt, A, order, dt_weight, D=None, dt_bias=None, *others):
    """The `Plan` of a scan, and its arguments as the kernels take them. `others` are activations it reads or writes.

    The steps are cut if batch, groups and channels give a multiprocessor fewer than eight warps.

    Raises:
        ValueError: tokens lie 2^32 bytes or more apart.
    """
    batch, length, G, channels = u.shape
    steps = length if order is None else order.shape[-1]
    (blocks, threads), vector = cuda.channel_blocks(channels), 1
    activations = [x for x in (u, dt if dt_weight is None else None, *others) if x is not None]
    far = max(abs(x.stride(1)) * x.element_size() for x in (*activations, dt))
    if far >= 2**32:
        raise ValueError(f"{NAME}: expected tokens less than 2^32 bytes apart, got {far}")
    if A.shape[1] == 1:
        vector = cuda.vector(OWN, *activations, *(x for x in (D, dt_weight, dt_bias) if x is not None))
        blocks, threads = -(-channels // (lanes(channels) * vector)), cuda.MAX_THREADS
    parallel = 4 * batch * G * threads * blocks
    return Plan(blocks, threads, *cuda.segments(steps, parallel, u.device, 256, chunk(channels, A.shape[1])), vector)


def _sizes(p, u, order):
    """Grid and threads, and the arguments of every kernel."""
    batch, length, G, D = u.shape
    steps = length if order is None else order.shape[-1]
    sizes = dict(G=G, D=D, steps=steps, blocks=p.blocks, segments=p.segments, segment_steps=p.segment_steps)
    return (batch * G * p.segments * p.blocks, p.threads), sizes | cuda.order_arguments(order, 2)


def _ends(u, A, segments):
    """Buffers for a pass over each segment alone: its last state, and the sum of its steps."""
    batch, _, G, D = u.shape
    return A.new_empty(batch, G, segments, A.shape[1], D), A.new_empty(batch, G, segments, D)


def _carry(boundary, sums, A, reverse):
    B, G, segments, N, D = boundary.shape
    name = cuda.template("carry", A.dtype, reverse)
    grid = -(-B * G * N * D // cuda.MAX_THREADS), cuda.MAX_THREADS
    cuda.launch(NAME, name, *grid, boundary=boundary, sums=sums, A=A, B=B, G=G, N=N, D=D, segments=segments)


def forward(*, u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, merge, y, states):
    """Writes `y` and, unless it is empty, `states`; arguments as `_kernel_inputs` prepares them."""
    out, merged, G = y, None, u.shape[2]
    if merge and G > 1 and torch.are_deterministic_algorithms_enabled():
        out = u.new_zeros(u.shape)
    elif merge and G > 1:
        out = merged = y.zero_() if y.dtype == A.dtype else A.new_zeros(y.shape)
    elif merge and order is not None and order.shape[-1] < u.shape[1]:
        y.zero_()
    p = plan(u, dt, A, order, dt_weight, D, dt_bias, out)
    grid, sizes = _sizes(p, u, order)
    tensors = dict(u=u, dt=dt, B=B, C=C, A=A, skip=D, weight=dt_weight, bias=dt_bias) | sizes
    boundary = None
    if p.segments > 1:
        boundary, sums = _ends(u, A, p.segments)
        name = p.template("forward", u, A, dt_weight, softplus, True)
        cuda.launch(NAME, name, *grid, **tensors, boundary=boundary, sums=sums, states=None, y=None, merged=None)
        _carry(boundary, sums, A, False)
    written = dict(y=None if merged is not None else out, y_batch=out.stride(0), y_token=out.stride(1), merged=merged)
    written["y_group"] = out.stride(2) if out.dim() == 4 else 0
    name, saved = p.template("forward", u, A, dt_weight, softplus, False), states if states.numel() else None
    cuda.launch(NAME, name, *grid, **tensors, boundary=boundary, sums=None, states=saved, **written)
    if merged is not None and merged is not y:
        y.copy_(merged)
    elif out is not y:
        torch.sum(out, 2, out=y)


def backward(
    *,
    p,
    dy,
    u,
    dt,
    A,
    B,
    C,
    D,
    dt_weight,
    dt_bias,
    softplus,
    order,
    states,
    du,
    ddt,
    dA,
    dB,
    dC,
    dD,
    ddt_weight,
    ddt_bias,
):
    """Writes the gradients, cut as in `p`: those of A, D, dt_weight and dt_bias per batch item and segment, those of
    B, C and a low-rank dt per block of channels. A `du` ``(B, L, 1, D)`` in the dtype of A is added to.
    """
    grid, sizes = _sizes(p, u, order)
    one = A.shape[1] == 1
    tensors = dict(dy=dy, dt=dt, C=C, A=A, weight=dt_weight, bias=dt_bias) | sizes
    full, low = (ddt, None) if dt_weight is None else (None, ddt)
    du, merged = (None, du) if du.shape[2] < u.shape[2] else (du, None)
    more = dict(u=u, B=B, skip=D, batch=u.shape[0], L=u.shape[1], states=states)
    grads = dict(
        du=du, merged=merged, ddt=full, dA=dA, dB=dB, dC=dC, dskip=dD, dlow=low, dweight=ddt_weight, dbias=ddt_bias
    )
    boundary = None if one else A.new_zeros(u.shape[0], *A.shape[:1], 1, *A.shape[1:])  # the kernel's adjoint states
    if p.segments > 1:
        boundary, sums = _ends(u, A, p.segments)
        name, unused = p.template("adjoint_ends", u, A, dt_weight, softplus), more | dict.fromkeys(grads) if one else {}
        cuda.launch(NAME, name, *grid, **tensors, **unused, boundary=boundary, sums=sums)
        _carry(boundary, sums, A, True)
    name = p.template("backward", u, A, dt_weight, softplus)
    cuda.launch(NAME, name, *grid, **tensors, **more, **grads, boundary=boundary, **(dict(sums=None) if one else {}))
