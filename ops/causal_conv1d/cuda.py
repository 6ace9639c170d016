"""Arguments and grids of the kernels in cuda.cu."""

from .. import compile_cuda as cuda

NAME = "causal_conv1d"


def _plan(x):
    batch, L, G, C = x.shape
    blocks, threads = cuda.channel_blocks(C)
    return blocks, threads, *cuda.segments(L, batch * G * threads * blocks, x.device, least=32)


def _run(kernel, x, weight, bias, order, silu, **tensors):
    blocks, threads, segments, segment_steps = _plan(x)
    B, L, G, C = x.shape
    name = cuda.template(kernel, x.dtype, weight.dtype, weight.shape[2], silu)
    sizes = dict(L=L, G=G, C=C, blocks=blocks, segments=segments, segment_steps=segment_steps)
    named = dict(x=x, weights=weight, biases=bias) | cuda.order_arguments(order, 2)
    cuda.launch(NAME, name, B * G * segments * blocks, threads, **named, **sizes, **tensors)


def forward(x, weight, bias, order, silu):
    """``(B, L, G, C)``, contiguous; `weight` and `bias` in the dtype of sums, `order` int32."""
    y = x.new_empty(x.shape)
    _run("forward", x, weight, bias, order, silu, y=y)
    return y


def backward(dy, x, weight, bias, order, silu):
    """Gradients of x, weight and bias (also where that is None)."""
    dx, parts = x.new_empty(x.shape), x.shape[0] * _plan(x)[2]
    dweight, dbias = weight.new_empty(parts, *weight.shape), weight.new_empty(parts, *weight.shape[:2])
    _run("backward", x, weight, bias, order, silu, dy=dy.contiguous(), dx=dx, dweight=dweight, dbias=dbias)
    return dx, dweight.sum(0), dbias.sum(0)
