"""Arguments and grids of the kernels in cuda.cu."""

from .. import compile_cuda as cuda

VECTOR = 4  # channels per thread, if they are aligned


def split_rows(rows, channels, device):
    """Rows per block, so that blocks fill the device. A block has 128 channels if they are aligned, else 32."""
    blocks = -(-channels // (32 * VECTOR if channels % VECTOR == 0 else 32))
    splits = max(cuda.multiprocessors(device) * 16 // blocks, 1)
    return max(-(-rows // splits), 16)


def forward(**tensors):
    """x ``(rows, C)``, table ``(10, C)``; writes y."""
    _launch("forward", **tensors)


def backward(**tensors):
    """Writes dx and sums ``(splits, 10, C)``: the gradients of a and |b|, summed over the rows of each split."""
    _launch("backward", **tensors)


def _launch(kernel, *, x, table, split_rows, **tensors):
    rows, C = x.shape
    vector = cuda.vector(VECTOR, x, *(t for t in tensors.values() if t.dtype == x.dtype))
    grid = -(-rows // split_rows) * -(-C // (32 * vector))
    name = cuda.template(kernel, x.dtype, table.dtype, vector)
    sizes = dict(rows=rows, C=C, split_rows=split_rows)
    cuda.launch("rational", name, grid, cuda.MAX_THREADS, x=x, table=table, **sizes, **tensors)
