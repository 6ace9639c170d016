"""Arguments and grids of the kernels in cuda.cu."""

import math

import torch

from .. import compile_cuda as cuda

NAME = "deform_conv"
VECTOR = 4  # channels per thread, if they are aligned


def _arguments(x, offset, weight, stride, padding, dilation, offset_scale):
    rows, columns, G, taps = weight.shape[1:]
    K = math.isqrt(taps)
    centre = dilation * (K - 1) // 2
    sizes = dict(zip("BHWC", x.shape, strict=True)) | dict(rows=rows, columns=columns, G=G)
    options = dict(stride=stride, dilation=dilation, centre=centre, first=centre - padding, scale=offset_scale)
    return dict(x=x, offset=offset, weight=weight) | sizes | options


def _instance(kernel, x, offset, weight, *others):
    """Channels per thread, and the template parameters that both kernels share."""
    channels = x.shape[-1] // weight.shape[3]
    vector = cuda.vector(VECTOR, x, *others) if channels % VECTOR == 0 else 1
    return vector, (kernel, x.dtype, offset.dtype, math.isqrt(weight.shape[4]), vector)


def forward(x, offset, weight, *options_and_y):
    """Writes y ``(B, H', W', C)``."""
    *options, y = options_and_y
    vector, instance = _instance("forward", x, offset, weight, y)
    grid = -(-y.numel() // (vector * cuda.MAX_THREADS))
    cuda.launch(NAME, cuda.template(*instance), grid, cuda.MAX_THREADS, **_arguments(x, offset, weight, *options), y=y)


def backward(dy, x, offset, weight, *options):
    """Gradients of x (in the dtype of `offset`), of offset and of weight.

    Raises:
        RuntimeError: deterministic algorithms are requested; the gradient of x is summed in no fixed order.
    """
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(
            "deform_conv has no deterministic backward pass on CUDA; "
            "use torch.use_deterministic_algorithms(True, warn_only=True) or linzoo.ops.use_backend('reference')"
        )
    dx = offset.new_zeros(x.shape)
    doffset, dweight = offset.new_empty(offset.shape), weight.new_empty(weight.shape)
    vector, instance = _instance("backward", x, offset, weight, dy)
    threads = -(-x.shape[-1] // (weight.shape[3] * vector))  # that a group's channels need
    lanes = next((n for n in (4, 8, 16) if n >= threads), 32)
    grid = -(-weight.shape[:4].numel() // (cuda.MAX_THREADS // lanes))
    grads = dict(dx=dx, doffset=doffset, dweight=dweight)
    cuda.launch(
        NAME,
        cuda.template(*instance, lanes),
        grid,
        cuda.MAX_THREADS,
        dy=dy,
        **_arguments(x, offset, weight, *options),
        **grads,
    )
    return dx, doffset, dweight
