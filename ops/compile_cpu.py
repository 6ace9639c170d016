"""Compiles the CPU kernels: ``python -m linzoo.ops.compile_cpu`` builds all of them ahead, for images and clusters.

Each operator's ``cpu.cpp`` needs a C++17 compiler and the headers that torch ships (its stable ABI). The library goes
to `kernel_cache`, under a name made of everything it depends on.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .kernel_cache import stored

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


def library_name(name):
    """File name of the compiled kernel of operator `name`: keyed by sources, flags, compiler, CPU and torch."""
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256()
    for path in [sources()[name], *sorted(OPS.glob("*.h"))]:
        key.update(path.read_bytes())
    key.update(repr([FLAGS, compiler, version, _cpu_flags(), torch.__version__]).encode())
    return f"{name}-cpu-{key.hexdigest()[:16]}.so"


def build(name, folder=None, anew=False):
    """Compiles operator `name` unless the cache holds it; returns the library's path.

    Args:
        name: Operator.
        folder, anew: As `kernel_cache.stored`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    return stored(library_name(name), functools.partial(_compile, name), folder, anew)


def _compile(name, target):
    compiler, torch_dir = find_compiler(), Path(torch.__file__).parent
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu", "-lc10"]
    command = [compiler, *FLAGS, native, f"-I{torch_dir / 'include'}", str(sources()[name])]
    command += ["-o", str(target), f"-L{torch_dir / 'lib'}", *link]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{compiler} failed on {sources()[name]}:\n{result.stderr[-2000:]}")


def main():
    """Builds every CPU kernel, as many at once as there are cores, and prints where each lies.

    Returns:
        Exit status: 1 if one fails.
    """
    status = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = {name: pool.submit(build, name) for name in sources()}
    for name, result in builds.items():
        try:
            print(f"{name}: {result.result()}")
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
