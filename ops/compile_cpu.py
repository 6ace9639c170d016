"""Compiles the CPU kernels: ``python -m linzoo.ops.compile_cpu`` builds all of them ahead, for images and clusters.

Each operator's ``cpu.cpp`` needs a C++17 compiler and the headers that torch ships (its stable ABI). The library goes
to the user's cache directory, or to ``LINZOO_CACHE``, under a name made of everything it depends on. It is written
under a lock and moved into place whole, since several training processes start at once.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import filelock
import platformdirs
import torch

OPS = Path(__file__).resolve().parent
CHUNK = 32  # steps between two stored states
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-w",
    f"-DLINZOO_CHUNK={CHUNK}",
]


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message says why and what to do."""


def sources():
    """Operators that have a CPU kernel, by name: ``{"selective_scan": Path(".../cpu.cpp"), ...}``."""
    return {path.parent.name: path for path in sorted(OPS.glob("*/cpu.cpp"))}


def find_compiler():
    """The C++ compiler: ``$CXX``, else the first of c++, g++ and clang++ on PATH.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}); install g++ or set CXX")


def _cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def cache_dir():
    """Where compiled kernels are kept: ``$LINZOO_CACHE``, else the user's cache directory.

    If it cannot be written, a directory that lasts as long as this process, with a warning.
    """
    path = Path(os.environ.get("LINZOO_CACHE") or platformdirs.user_cache_dir("linzoo"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        temporary = tempfile.TemporaryDirectory(prefix="linzoo-")
        cache_dir.keep = temporary  # removed when the process ends
        warnings.warn(
            f"LINZOO_CACHE: cannot write to {path} ({error.strerror}); kernels are compiled anew in every process. "
            "Set LINZOO_CACHE to a writable directory.",
            stacklevel=2,
        )
        return Path(temporary.name)


def library_path(name):
    """Path of the compiled kernel of operator `name`: keyed by sources, flags, compiler, CPU and torch."""
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256()
    for path in [sources()[name], *sorted(OPS.glob("*.h"))]:
        key.update(path.read_bytes())
    key.update(repr([FLAGS, compiler, version, _cpu_flags(), torch.__version__]).encode())
    return cache_dir() / f"{name}-cpu-{key.hexdigest()[:16]}.so"


def build(name):
    """Compiles operator `name` unless the cache holds it; returns the library's path.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler, path = find_compiler(), library_path(name)
    if path.exists():
        return path
    with filelock.FileLock(f"{path}.lock"):
        if path.exists():  # another process was faster
            return path
        partial = path.with_suffix(f".{os.getpid()}.partial")
        torch_dir = Path(torch.__file__).parent
        native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu", "-lc10"]
        command = [compiler, *FLAGS, native, f"-I{torch_dir / 'include'}", str(sources()[name])]
        command += ["-o", str(partial), f"-L{torch_dir / 'lib'}", *link]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise BuildError(f"{compiler} failed on {sources()[name]}:\n{result.stderr[-2000:]}")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def main():
    """Builds every CPU kernel and prints where each lies; exit status 1 if one fails."""
    status = 0
    for name in sources():
        try:
            print(f"{name}: {build(name)}")
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
