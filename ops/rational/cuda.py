"""Arguments and grids of the kernels in cuda.cu."""

from .. import cuda


def split_rows(rows, channels, device):
    """Rows per block, so that blocks of 32 channels fill the machine."""
    blocks = -(-channels // 32)
    splits = max(cuda.multiprocessors(device) * 16 // blocks, 1)
    return max(-(-rows // splits), 16)


def forward(x, table, rows, y):
    """x ``(rows, C)``, table ``(10, C)``; writes y."""
    _launch("forward", x, table, rows, x, table, y)


def backward(dy, x, table, rows, dx, sums):
    """Writes dx and sums ``(splits, 10, C)``, those of a and of |b| over the rows of a split."""
    _launch("backward", x, table, rows, dy, x, table, dx, sums)


def _launch(kernel, x, table, rows, *tensors):
    count, channels = x.shape
    grid = -(-count // rows) * -(-channels // 32)
    sizes, outputs = (count, channels, rows), 1 if kernel == "forward" else 2
    name = cuda.template(kernel, x.dtype, table.dtype)
    cuda.launch("rational", name, grid, cuda.MAX_THREADS, *tensors[:-outputs], *sizes, *tensors[-outputs:])
