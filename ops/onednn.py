"""float32 matrix products on the CPU by oneDNN, which PyTorch holds for convolutions, instead of MKL.

PyTorch multiplies matrices by MKL. On AMD's processors MKL uses AVX2 even where there is AVX-512, at half of its speed;
oneDNN looks at the instructions alone. ``LINZOO_MATMUL=onednn`` or `use_onednn` put `linear`, `mm` and `addmm` of the
process onto oneDNN, in every model and in training. Values differ by rounding.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["use_onednn"]

LEAST = 2**21  # multiplications below which MKL takes no longer
LEAST_WIDTH = 160  # columns below which oneDNN's copy of a transposed matrix costs more than it gains

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_library = None


@contextlib.contextmanager
def use_onednn() -> Iterator[None]:
    """Multiplies large float32 matrices on the CPU by oneDNN inside the block, in the whole process.

    Other dtypes, batched products (`bmm`) and small matrices stay as they are. What was compiled outside the block
    keeps its products.

    Raises:
        RuntimeError: this PyTorch was built without oneDNN.
    """
    global _library
    if _library is not None:
        yield
        return
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("use_onednn (LINZOO_MATMUL=onednn): this PyTorch was built without oneDNN")
    _library = _override()
    try:
        yield
    finally:
        _library._destroy()
        _library = None


def is_used() -> bool:
    """Whether `use_onednn` or ``LINZOO_MATMUL=onednn`` holds."""
    return _library is not None


def _override():
    """Puts a function of ours before `mm` and `addmm` of CPU tensors, until the returned library is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden, which is what was asked for
        for name in ("mm", "addmm", "mm.out", "addmm.out"):
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _instead_of(kernel.call_boxed), "CPU", allow_override=True)
    return library


def _instead_of(kernel):
    """What runs for PyTorch's `kernel`: oneDNN where it serves, else that kernel."""

    def run(*inputs, out=None, **scales):
        *bias, a, b = inputs
        fits = out is None or (out.dtype == a.dtype and out.shape == (a.shape[0], b.shape[1]))
        y = _product(a, b, *bias) if fits and all(scale == 1 for scale in scales.values()) else None
        if y is None:
            return kernel(_CPU, *inputs, **scales, **({} if out is None else {"out": out}))
        return y if out is None else out.copy_(y)

    return run


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``a b + bias`` by oneDNN; None for what it does not take, or takes longer for."""
    (m, k), n = a.shape, b.shape[-1]
    if a.dtype is not torch.float32 or b.dtype is not torch.float32 or b.shape[0] != k or m * k * n < LEAST:
        return None
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (n,)):
        return None
    linear = torch.ops.mkldnn._linear_pointwise.default
    if a.is_contiguous():
        return linear(a, b.t(), bias, "none", [], "")
    if bias is not None or max(m, n) < LEAST_WIDTH:
        return None
    if m <= n:
        return linear(a, b.t(), None, "none", [], "")
    return linear(b.t(), a, None, "none", [], "").t().contiguous()  # the smaller matrix is the one that is copied


_wanted = os.environ.get("LINZOO_MATMUL") or None
if _wanted == "onednn":
    _for_good = use_onednn()  # held, since the block ends with it
    _for_good.__enter__()
elif _wanted is not None:
    raise ValueError(f"LINZOO_MATMUL: expected 'onednn' or nothing, got {_wanted!r}")
