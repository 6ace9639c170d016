"""Arguments and grids of the kernels in cuda.cu."""

from .. import cuda

NAME = "causal_conv1d"


def _plan(x):
    batch, L, G, C = x.shape
    blocks, threads = cuda.channel_blocks(C)
    return blocks, threads, *cuda.segments(L, batch * G * threads * blocks, x.device, least=32)


def _arguments(x, weight, bias, order):
    blocks, _, *segments = _plan(x)
    order_batch = 0 if order is None or order.dim() == 2 else order.stride(0)
    return x, *x.stride()[:3], weight, bias, order, order_batch, *x.shape[1:], blocks, *segments


def _run(kernel, x, weight, bias, order, silu, before, after):
    blocks, threads, segments, _ = _plan(x)
    name = cuda.template(kernel, x.dtype, weight.dtype, weight.shape[2], silu)
    grid = x.shape[0] * x.shape[2] * segments * blocks
    cuda.launch(NAME, name, grid, threads, *before, *_arguments(x, weight, bias, order), *after)


def forward(x, weight, bias, order, silu):
    """``(B, L, G, C)``, contiguous; `weight` and `bias` in the dtype of sums, `order` int32."""
    y = x.new_empty(x.shape)
    _run("forward", x, weight, bias, order, silu, (), (y,))
    return y


def backward(dy, x, weight, bias, order, silu):
    """Gradients of x, weight and bias (also where that is None)."""
    dx, parts = x.new_empty(x.shape), x.shape[0] * _plan(x)[2]
    dweight, dbias = weight.new_empty(parts, *weight.shape), weight.new_empty(parts, *weight.shape[:2])
    _run("backward", x, weight, bias, order, silu, (dy.contiguous(),), (dx, dweight, dbias))
    return dx, dweight.sum(0), dbias.sum(0)
