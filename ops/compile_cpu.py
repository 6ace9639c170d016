"""Compiles the CPU kernels. ``python -m linzoo.ops.compile_cpu`` builds all of them ahead, for images and clusters.

Each operator's ``cpu.cpp`` needs a C++17 compiler and the headers that ship with torch (its stable ABI). The library
goes to `kernel_cache`, under a name made from everything it depends on.

A platform wheel (``make wheel``) holds the libraries in ``prebuilt/<level>/``, for every processor level. They need
no compiler and load with any torch from 2.10 on.
"""

import argparse
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .kernel_cache import stored

OPS = Path(__file__).resolve().parent
PREBUILT = OPS / "prebuilt"
X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = ("x86-64-v4", "x86-64-v3") if X86 else ("armv8-a",)  # instruction sets, as -march names them; the best first
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
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10, the oldest that may load the library
]


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message says why and what to do about it."""


def sources():
    """Operators that have a CPU kernel, by name: ``{"selective_scan": Path(".../cpu.cpp"), ...}``."""
    return {path.parent.name: path for path in sorted(OPS.glob("*/cpu.cpp"))}


def kernels(name):
    """Names of the forward kernels in operator `name`'s library, as in ``torch.ops.linzoo_cpu.<kernel>``."""
    return re.findall(r'm\.impl\("(\w+_forward)"', sources()[name].read_text())


def find_compiler():
    """The C++ compiler: ``$CXX``, else the first of c++, g++ and clang++ on PATH.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    held = {path.name for path in PREBUILT.glob("*")}
    fit = not held or held.intersection(levels())
    unfit = "" if fit else f", as this wheel's kernels are for {', '.join(sorted(held))} and this processor is not"
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}); install g++ or set CXX{unfit}")


def _cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor()


def library_name(name, *further, ending="so"):
    """File name of the compiled kernel of operator `name`, keyed by sources, flags, compiler, CPU, torch, `further`."""
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return f"{name}-cpu-{_key(name, compiler, version, _cpu_flags(), torch.__version__, *further)}.{ending}"


def _key(name, *further):
    """16 hexadecimal digits for an operator's sources, the flags and whatever else its library depends on."""
    key = hashlib.sha256()
    for path in [sources()[name], *sorted(OPS.glob("*.h"))]:
        key.update(path.read_bytes())
    key.update(repr([FLAGS, *further]).encode())
    return key.hexdigest()[:16]


def levels():
    """The instruction-set levels that this processor supports, the best first."""
    return LEVELS[{"AVX512": 0, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 2) if X86 else 0 :]


def prebuilt(name):
    """The library of operator `name` in a platform wheel for this processor; None if there is none."""
    paths = (prebuilt_path(name, level) for level in levels())
    return next((path for path in paths if path.exists()), None)


def prebuilt_path(name, level):
    """Where a platform wheel holds the library of operator `name` for a processor level."""
    return PREBUILT / level / f"{name}-{_key(name)}.so"


def build(name, folder=None, anew=False):
    """Compiles operator `name` unless the cache holds it; returns the library's path.

    Args:
        name: Operator.
        folder, anew: As in `kernel_cache.stored`.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    return stored(library_name(name), functools.partial(_compile, name), folder, anew)


def _compile(name, target, level="native"):
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu", "-lc10"]
    _run_compiler(name, target, level, [str(sources()[name]), f"-L{Path(torch.__file__).parent / 'lib'}", *link])


def compile_object(name, text, target):
    """Compiles C++ `text`, made of operator `name`'s kernels, for this processor into the object file `target`.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    _run_compiler(name, target, "native", ["-c", f"-I{OPS}", "-x", "c++", "-"], text)


def _run_compiler(name, target, level, arguments, text=None):
    compiler = find_compiler()
    march = "-mcpu=native" if level == "native" and not X86 else f"-march={level}"
    command = [compiler, *FLAGS, march, f"-I{Path(torch.__file__).parent / 'include'}", "-o", str(target), *arguments]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{compiler} failed on {sources()[name]}:\n{result.stderr[-2000:]}")


def build_ahead(name, level):
    """Compiles operator `name` for all processors of a level, as in a platform wheel; returns its path.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    path = prebuilt_path(name, level)
    path.parent.mkdir(parents=True, exist_ok=True)
    _compile(name, path, level)
    return path


def wheel_platform():
    """The platform tag of a wheel with kernels compiled here. They need this machine's C library or a later one."""
    library, version = platform.libc_ver()
    if library != "glibc":
        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"manylinux_{version.replace('.', '_')}_{platform.machine()}"


def main(argv=None):
    """Builds every CPU kernel, in parallel on all cores, and prints each path.

    Returns:
        Exit status: 1 if one fails.
    """
    parser = argparse.ArgumentParser(prog="python -m linzoo.ops.compile_cpu", description=__doc__)
    parser.add_argument(
        "--prebuilt",
        nargs="*",
        choices=LEVELS,
        metavar="LEVEL",
        help=f"into the package, for these levels of processors: {', '.join(LEVELS)}; default: all",
    )
    parser.add_argument("--platform", action="store_true", help="print the platform tag of such a wheel, and end")
    args = parser.parse_args(argv)
    if args.platform:
        print(wheel_platform())
        return 0
    status = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if args.prebuilt is None:
            builds = {name: pool.submit(build, name) for name in sources()}
        else:
            asked = args.prebuilt or LEVELS
            builds = {f"{n} {level}": pool.submit(build_ahead, n, level) for n in sources() for level in asked}
    for name, result in builds.items():
        try:
            print(f"{name}: {result.result()}")
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
