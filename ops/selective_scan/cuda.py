"""Arguments and grids of the kernels in cuda.cu; called as those of the CPU are."""

import torch

from .. import compile_cuda as cuda
from ..tensors import state_dtype

NAME = "selective_scan"


def plan(u, steps):
    """Blocks of channels and their threads; segments of the steps and their length."""
    blocks, threads = cuda.channel_blocks(u.shape[3])
    return blocks, threads, *cuda.segments(steps, u.shape[0] * u.shape[2] * threads * blocks, u.device)


def _prepare(u, A, dt_weight, order):
    """Grid, threads, what every kernel takes, and the template parameters that all have; `A` is ``(G, N, D)``."""
    batch, length, G, D = u.shape
    steps = length if order is None else order.shape[-1]
    blocks, threads, segments, segment_steps = plan(u, steps)
    sizes = dict(G=G, D=D, steps=steps, blocks=blocks, segments=segments, segment_steps=segment_steps)
    types = u.dtype, state_dtype(u.dtype), A.shape[1], 0 if dt_weight is None else dt_weight.shape[1]
    return (batch * G * segments * blocks, threads), sizes | cuda.order_arguments(order, 2), types


def _ends(u, A, segments):
    """What a pass over segments alone leaves: their last states, and the sums of their steps."""
    batch, _, G, D = u.shape
    return A.new_empty(batch, G, segments, A.shape[1], D), A.new_empty(batch, G, segments, D)


def _carry(boundary, sums, A, reverse):
    B, G, segments, N, D = boundary.shape
    name = cuda.template("carry", A.dtype, reverse)
    grid = -(-B * G * N * D // cuda.MAX_THREADS), cuda.MAX_THREADS
    cuda.launch(NAME, name, *grid, boundary=boundary, sums=sums, A=A, B=B, G=G, N=N, D=D, segments=segments)


def forward(*, u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, merge, y, states):
    """Writes `y` and, unless it is empty, `states`; arguments as `_kernel_inputs` prepares them."""
    grid, sizes, types = _prepare(u, A, dt_weight, order)
    tensors = dict(u=u, dt=dt, B=B, C=C, A=A, skip=D, weight=dt_weight, bias=dt_bias) | sizes
    boundary, G = None, u.shape[2]
    if sizes["segments"] > 1:
        boundary, sums = _ends(u, A, sizes["segments"])
        name = cuda.template("forward", *types, softplus, True)
        cuda.launch(NAME, name, *grid, **tensors, boundary=boundary, sums=sums, states=None, y=None, merged=None)
        _carry(boundary, sums, A, False)
    out, merged = y, None
    if merge and G > 1 and torch.are_deterministic_algorithms_enabled():
        out = u.new_zeros(u.shape)
    elif merge and G > 1:
        out = merged = y.zero_() if y.dtype == A.dtype else A.new_zeros(y.shape)
    elif merge and sizes["steps"] < u.shape[1]:
        y.zero_()
    written = dict(y=None if merged is not None else out, y_batch=out.stride(0), y_token=out.stride(1), merged=merged)
    written["y_group"] = out.stride(2) if out.dim() == 4 else 0
    name, saved = cuda.template("forward", *types, softplus, False), states if states.numel() else None
    cuda.launch(NAME, name, *grid, **tensors, boundary=boundary, sums=None, states=saved, **written)
    if merged is not None and merged is not y:
        y.copy_(merged)
    elif out is not y:
        torch.sum(out, 2, out=y)


def backward(
    *,
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
    """Writes the gradients: those of A, D, dt_weight and dt_bias per batch item and segment, those of B, C and a
    low-rank dt per block of channels.
    """
    grid, sizes, types = _prepare(u, A, dt_weight, order)
    types = *types, softplus
    tensors = dict(dy=dy, dt=dt, C=C, A=A, weight=dt_weight, bias=dt_bias) | sizes
    boundary = None
    if sizes["segments"] > 1:
        boundary, sums = _ends(u, A, sizes["segments"])
        cuda.launch(NAME, cuda.template("adjoint_ends", *types), *grid, **tensors, boundary=boundary, sums=sums)
        _carry(boundary, sums, A, True)
    tensors |= dict(u=u, B=B, skip=D, batch=u.shape[0], L=u.shape[1], boundary=boundary, states=states)
    full, low = (ddt, None) if dt_weight is None else (None, ddt)
    grads = dict(du=du, ddt=full, dA=dA, dB=dB, dC=dC, dskip=dD, dlow=low, dweight=ddt_weight, dbias=ddt_bias)
    cuda.launch(NAME, cuda.template("backward", *types), *grid, **tensors, **grads)
