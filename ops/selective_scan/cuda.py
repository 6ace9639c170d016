"""Arguments and grids of the kernels in cuda.cu; called as those of the CPU are."""

import torch

from .. import cuda
from .reference import state_dtype

NAME = "selective_scan"


def _sizes(u, A, order):
    """Batch, tokens, groups, channels, states and steps."""
    return *u.shape, A.shape[1], u.shape[1] if order is None else order.shape[-1]


def plan(u, steps):
    """Blocks of channels and their threads; segments of the steps and their length."""
    blocks, threads = cuda.channel_blocks(u.shape[3])
    return blocks, threads, *cuda.segments(steps, u.shape[0] * u.shape[2] * threads * blocks, u.device)


def _rows(*tensors):
    return [value for x in tensors for value in (x, *x.stride()[:3])]


def _order(order):
    return order, 0 if order is None or order.dim() == 2 else order.stride(0)


def _types(u, A, dt_weight):
    """Template parameters that every kernel has; `A` is ``(G, N, D)``, `dt_weight` ``(G, R, D)``."""
    return u.dtype, state_dtype(u.dtype), A.shape[1], 0 if dt_weight is None else dt_weight.shape[1]


def forward(u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, merge, y, states):
    """Writes `y` and, unless it is empty, `states`; arguments as `_kernel_inputs` prepares them."""
    batch, _, G, channels, N, steps = _sizes(u, A, order)
    blocks, threads, segments, length = plan(u, steps)
    grid, types = batch * G * segments * blocks, _types(u, A, dt_weight)
    sizes = G, channels, steps, blocks, segments, length
    tensors = *_rows(u, dt, B, C), A, D, dt_weight, dt_bias, *_order(order), *sizes
    boundary = None
    if segments > 1:
        boundary = A.new_empty(batch, G, segments, N, channels)
        sums = A.new_empty(batch, G, segments, channels)
        name = cuda.template("forward", *types, softplus, True)
        cuda.launch(NAME, name, grid, threads, *tensors, boundary, sums, None, None, 0, 0, 0, None)
        _carry(boundary, sums, A, False)
    saved = states if states.numel() else None
    out, merged = y, None
    if merge and G > 1 and torch.are_deterministic_algorithms_enabled():
        out = u.new_zeros(u.shape)
    elif merge and G > 1:
        merged = y.zero_() if y.dtype == A.dtype else A.new_zeros(y.shape)
        out = merged
    elif merge and steps < u.shape[1]:
        y.zero_()
    group = out.stride(2) if out.dim() == 4 else 0
    name = cuda.template("forward", *types, softplus, False)
    written = (None, *out.stride()[:2], 0, out) if merged is not None else (out, *out.stride()[:2], group, None)
    cuda.launch(NAME, name, grid, threads, *tensors, boundary, None, saved, *written)
    if merged is not None and merged is not y:
        y.copy_(merged)
    elif out is not y:
        torch.sum(out, 2, out=y)


def _carry(boundary, sums, A, reverse):
    batch, G, segments, N, channels = boundary.shape
    name = cuda.template("carry", A.dtype, reverse)
    grid = -(-batch * G * N * channels // cuda.MAX_THREADS)
    cuda.launch(NAME, name, grid, cuda.MAX_THREADS, boundary, sums, A, batch, G, N, channels, segments)


def backward(
    dy, u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, states, du, ddt, dA, dB, dC, dD, dweight, dbias
):
    """Writes the gradients: those of A, D, dt_weight and dt_bias per batch item and segment, those of B, C and a
    low-rank dt per block of channels.
    """
    batch, L, G, channels, N, steps = _sizes(u, A, order)
    blocks, threads, segments, length = plan(u, steps)
    grid, types = batch * G * segments * blocks, (*_types(u, A, dt_weight), softplus)
    sizes = G, channels, steps, blocks, segments, length
    boundary = None
    if segments > 1:
        boundary = A.new_empty(batch, G, segments, N, channels)
        sums = A.new_empty(batch, G, segments, channels)
        tensors = *_rows(dy, dt, C), A, dt_weight, dt_bias, *_order(order), *sizes
        cuda.launch(NAME, cuda.template("adjoint_ends", *types), grid, threads, *tensors, boundary, sums)
        _carry(boundary, sums, A, True)
    tensors = *_rows(dy, u, dt, B, C), A, D, dt_weight, dt_bias, *_order(order), batch, L, *sizes
    full, low = (ddt, None) if dt_weight is None else (None, ddt)
    grads = du, full, dA, dB, dC, dD, low, dweight, dbias
    cuda.launch(NAME, cuda.template("backward", *types), grid, threads, *tensors, boundary, states, *grads)
