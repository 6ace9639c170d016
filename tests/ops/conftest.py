"""`emulated_cuda`: the CUDA kernels, compiled by the C++ compiler and run on CPU tensors by `emulator.h`."""

import ctypes
import functools
import hashlib
import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from linzoo.ops import compile_cpu, compile_cuda, kernel_cache, operator
from linzoo.ops.backend import forced_backend

EMULATOR = Path(__file__).with_name("emulator.h")


@functools.cache
def emulated_kernel(op, name):
    """A function of (blocks, threads, addresses of the arguments) that runs template instance `name`."""
    return emulated(f'#include "{compile_cuda.sources()[op]}"', name, f"emulated-{op}", compile_cuda.sources()[op])


def emulated(source, name, file, *read):
    """The kernel `name` of some C++ as such a function; `file` begins the library's name, `read` are files of it."""
    source = f"""
    #include "{EMULATOR}"
    {source}
    extern "C" void run(long long grid, int block, void** arguments) {{
      emulator::launch([](void** a) {{ emulator::apply({name}, a); }}, grid, block, arguments);
    }}
    extern "C" void share(char* begin, size_t size) {{ emulator::shared_memory.emplace_back(begin, size); }}
    """
    command = [compile_cpu.find_compiler(), "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fno-gnu-unique"]
    command += [f"-I{compile_cpu.OPS}", *(f"-D{name}={value}" for name, value in compile_cuda.MACROS.items())]
    key = hashlib.sha256(f"{source}{command}".encode())
    for path in (EMULATOR, *read, *sorted(compile_cpu.OPS.glob("*.cuh"))):
        key.update(path.read_bytes())
    path = kernel_cache.cache_dir() / f"{file}-{key.hexdigest()[:16]}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        command += ["-x", "c++", "-", "-o", str(partial)]
        done = subprocess.run(command, input=source, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[:4000]
        partial.rename(path)
    library = ctypes.CDLL(str(path))
    run = library.run
    run.argtypes = (ctypes.c_longlong, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
    listed = subprocess.run(
        ["nm", "-S", "--defined-only", str(path)], text=True, check=True, capture_output=True
    ).stdout
    symbols = re.findall(r"^(\w+) (\w+) (\w) (\w+)$", listed, re.M)
    base = ctypes.cast(run, ctypes.c_void_p).value - next(
        int(at, 16) for at, _, _, symbol in symbols if symbol == "run"
    )
    for at, size, kind, symbol in symbols:
        if kind in "VbB" and symbol.startswith("_ZZ") and not symbol.startswith("_ZZN8emulator"):  # statics of kernels
            library.share(ctypes.c_void_p(base + int(at, 16)), ctypes.c_size_t(int(size, 16)))
    return run


def emulated_launch(op, name, grid, block, **named):
    """`linzoo.ops.compile_cuda.launch` on CPU tensors."""
    values = compile_cuda.arguments(op, name, **named)
    if grid == 0:
        return
    values = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_longlong(v) for v in values]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    emulated_kernel(op, name)(grid, block, addresses)


@pytest.fixture
def emulated_cuda(monkeypatch):
    """A function that has the kernels of `ops/<kernel>` for CUDA serve CPU tensors, on the grids of an H100."""
    resolve, emulated = operator.resolve, set()

    def emulated_resolve(kernel, device):
        return "cuda" if kernel in emulated and not forced_backend() else resolve(kernel, device)

    def emulate(kernel):
        emulated.add(kernel)
        monkeypatch.setattr(compile_cuda, "launch", emulated_launch)
        monkeypatch.setattr(operator, "resolve", emulated_resolve)
        monkeypatch.setitem(operator.CHUNK, "cpu", operator.CHUNK["cuda"])
        if kernel == "mlstm":  # on CUDA it stores no states
            monkeypatch.setattr(importlib.import_module("linzoo.ops.mlstm"), "STORED_ON", ())

    return emulate


@pytest.fixture(name="emulated")
def emulated_source():
    """The function `emulated`, for kernels that a test writes itself."""
    return emulated
