"""Arguments and grids of the kernels in cuda.cu."""

from .. import compile_cuda as cuda


def split_rows(rows, channels, device):
    """Rows per block, so that blocks of 32 channels fill the machine."""
    blocks = -(-channels // 32)
    splits = max(cuda.multiprocessors(device) * 16 // blocks, 1)
    return max(-(-rows // splits), 16)


def forward(**tensors):
    """x ``(rows, C)``, table ``(10, C)``; writes y."""
    _launch("forward", **tensors)


def backward(**tensors):
    """Writes dx and sums ``(splits, 10, C)``, those of a and of |b| over the rows of a split."""
    _launch("backward", **tensors)


def _launch(kernel, *, x, table, split_rows, **tensors):
    rows, C = x.shape
    grid = -(-rows // split_rows) * -(-C // 32)
    name = cuda.template(kernel, x.dtype, table.dtype)
    sizes = dict(rows=rows, C=C, split_rows=split_rows)
    cuda.launch("rational", name, grid, cuda.MAX_THREADS, x=x, table=table, **sizes, **tensors)
