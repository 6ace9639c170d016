"""`emulated_cuda`: the CUDA kernels, compiled by the C++ compiler and run on CPU tensors by `emulator.h`."""

import ctypes
import functools
import hashlib
import importlib
import os
import subprocess
from pathlib import Path

import pytest

from linzoo.ops import backend, build, cuda

EMULATOR = Path(__file__).with_name("emulator.h")


@functools.cache
def emulated_kernel(op, name):
    """A function of (blocks, threads, addresses of the arguments) that runs template instance `name`."""
    source = f"""
    #include "{EMULATOR}"
    #include "{cuda.sources()[op]}"
    extern "C" void run(long long grid, int block, void** arguments) {{
      emulator::launch([](void** a) {{ emulator::apply({name}, a); }}, grid, block, arguments);
    }}
    """
    key = hashlib.sha256(source.encode())
    for path in (EMULATOR, cuda.sources()[op], *sorted(build.OPS.glob("*.cuh"))):
        key.update(path.read_bytes())
    library = build.cache_dir() / f"emulated-{op}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.partial")
        command = [build.find_compiler(), "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{build.OPS}"]
        command += ["-x", "c++", "-", "-o", str(partial)]
        subprocess.run(command, input=source, text=True, check=True, capture_output=True)
        partial.rename(library)
    run = ctypes.CDLL(str(library)).run
    run.argtypes = (ctypes.c_longlong, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
    return run


def emulated_launch(op, name, grid, block, *arguments):
    """`linzoo.ops.cuda.launch` on CPU tensors."""
    if grid == 0:
        return
    values = [cuda._value(a) for a in arguments]
    values = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_longlong(v) for v in values]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    emulated_kernel(op, name)(grid, block, addresses)


@pytest.fixture
def emulated_cuda(monkeypatch):
    """A function that has operator `op`'s CUDA kernels serve CPU tensors, on the grids of an H100."""

    def emulate(op):
        module = importlib.import_module(f"linzoo.ops.{op}")
        monkeypatch.setattr(cuda, "launch", emulated_launch)
        monkeypatch.setattr(module, "resolve", lambda op, device: backend.forced_backend() or "cuda")
        if hasattr(module, "CHUNK"):
            monkeypatch.setattr(module, "CHUNK", dict.fromkeys(("cpu", "cuda"), module.CHUNK["cuda"]))

    return emulate
