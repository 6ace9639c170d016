"""Which implementation runs an operator: ``cpu`` (C++), ``cuda`` (NVRTC), ``reference`` (PyTorch), or one for export.

By default the tensor's device decides. Without a kernel, ``reference`` runs: it warns once and says what to do, or
raises under ``LINZOO_STRICT=1``. ``LINZOO_BACKEND`` or `use_backend` force one backend.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch

from . import compile_cuda
from .compile_cpu import BuildError, build, kernels, prebuilt, sources
from .kernel_cache import cache_dir, temporary_dir

BACKENDS = ("cpu", "cuda", "reference", "export", "export_chunked", "aoti")


def _checked(name, argument):
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = _checked(os.environ.get("LINZOO_BACKEND") or None, "LINZOO_BACKEND")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces every operator of the process onto one backend inside the block; None restores the choice by device.

    ``export`` evaluates operators by `torch._higher_order_ops.scan`, which ``torch.onnx.export`` turns into ONNX Scan.
    ``export_chunked`` walks all chunks of a sequence together, where an operator has such a form: for fixed lengths.
    ``aoti`` lets `torch.export` see the CPU kernels that operators call, see `linzoo.ops.aoti`.

    Raises:
        ValueError: `name` is not a backend.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "name")
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend that `use_backend` or ``LINZOO_BACKEND`` asks for, or None."""
    return _forced


@functools.cache
def _load(op):
    """Loads operator `op`'s C++ library; returns None, or why it is not available."""
    if op not in sources():
        return f"{op} has no C++ kernel"
    cause = None
    try:
        for path in _libraries(op):
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                cause = str(error)
                continue
            if cause:
                warnings.warn(f"{op}: {path} serves, since {cause}", RuntimeWarning, stacklevel=2)
            for kernel in kernels(op):  # it writes into its arguments: nothing to do for tensors without data
                torch.library.register_fake(f"linzoo_cpu::{kernel}", lambda *args, **kwargs: None)
            return None
    except BuildError as error:
        return f"{error}; {cause}" if cause else str(error)
    return f"its library does not load: {cause}"


def _libraries(op):
    """Candidates for operator `op`'s C++ library, each tried if the one before does not load: the wheel's, then ours.

    A damaged cache is built anew. If the cache is mounted noexec, a temporary folder is used.
    """
    if path := prebuilt(op):
        yield path
    for folder, anew in ((cache_dir, False), (cache_dir, True), (temporary_dir, False)):
        yield build(op, folder(), anew)


def _unavailable(op, backend):
    """Why `backend` cannot run operator `op` here, or None if it can."""
    if backend == "cpu":
        return _load(op)
    if backend == "cuda":
        return compile_cuda.unavailable(op)
    return None


@functools.cache
def _warn_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def resolve(op, device):
    """Name of the backend that runs operator `op` on tensors of `device` (a `torch.device`).

    Raises:
        RuntimeError: a forced backend cannot run it; or, under ``LINZOO_STRICT=1``, only the reference can.
    """
    if _forced in ("reference", "export", "export_chunked"):
        return "reference"
    if _forced and ("cpu" if _forced == "aoti" else _forced) != device.type:
        raise RuntimeError(f"backend {_forced!r} is forced, but {op} was given tensors on {device}")
    if device.type in ("cpu", "cuda"):
        reason = _unavailable(op, device.type)
    else:
        reason = f"{op} has no kernel for {device.type} tensors"
    if reason is None:
        return device.type
    return fall_back(op, reason)


def fall_back(op, reason):
    """'reference', after a warning that says why; an error if a backend is forced or under ``LINZOO_STRICT=1``."""
    if _forced:
        raise RuntimeError(f"backend {_forced!r} is forced, but cannot serve {op}: {reason}")
    if os.environ.get("LINZOO_STRICT") == "1":
        raise RuntimeError(f"LINZOO_STRICT=1 forbids the slow reference, but nothing else can serve {op}: {reason}")
    _warn_once(f"linzoo.ops.{op} runs on its slow PyTorch reference: {reason}. LINZOO_STRICT=1 makes this an error.")
    return "reference"


def backend_info() -> dict[str, dict[str, str | None]]:
    """For each operator, which backends can run it here, and why the others cannot.

    Returns:
        ``{op: {"cpu": reason, "cuda": reason, "reference": None}}``; a reason is None if the backend can run it.
    """
    return {
        op: {backend: _unavailable(op, backend) for backend in ("cpu", "cuda", "reference")}
        for op in sorted(sources().keys() | compile_cuda.sources().keys())
    }
