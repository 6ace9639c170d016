"""Compiles the CUDA kernels with NVRTC and launches them: no nvcc, no host compiler, nothing built at install.

An operator's ``cuda.cu`` holds kernel templates, device code only. Its ``cuda.py`` sets their arguments and grid. A
template is compiled when it is first used on a device. The cubin is kept on disk, under a name made from everything
that it depends on.
"""
# pyright: reportAttributeAccessIssue=false

import concurrent.futures
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import re
import sys
import time
from typing import NamedTuple

import torch

from .compile_cpu import OPS, BuildError
from .kernel_cache import stored

MAX_THREADS = 128  # per block
CHUNK = 16  # steps between two stored states
MARKS = 8  # most chunks in a segment of bi_wkv
# Constants shared by the sources and their callers.
MACROS = {"LINZOO_THREADS": str(MAX_THREADS), "LINZOO_CHUNK": str(CHUNK), "LINZOO_MARKS": str(MARKS)}
REMEDY = "pip install linzoo[cuda]"


def sources():
    """Operators that have CUDA kernels, by name: ``{"selective_scan": Path(".../cuda.cu"), ...}``."""
    return {path.parent.name: path for path in sorted(OPS.glob("*/cuda.cu"))}


@functools.cache
def unavailable(op):
    """Why operator `op` has no CUDA kernel here, or None if it has one."""
    if op not in sources():
        return f"{op} has no CUDA kernel in this version"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return f"the package cuda-core, which compiles the CUDA kernels, is not installed: {REMEDY}"
    try:
        _nvrtc_version()
    except Exception as error:  # a broken installation may raise anything
        return f"NVRTC, which compiles the CUDA kernels, does not load ({type(error).__name__}: {error}): {REMEDY}"
    return None


@functools.cache
def _nvrtc_version():
    from cuda.bindings import nvrtc

    status, *version = nvrtc.nvrtcVersion()
    if status:
        raise BuildError(f"nvrtcVersion failed: {status}")
    return tuple(version)


class Cubin(NamedTuple):
    """A compiled kernel: the cubin, the kernel's name in it, and the compiler's report of registers and spills."""

    code: bytes
    symbol: str
    report: str


def compile_kernel(op, name, arch):
    """Compiles the template instance `name` of operator `op`, like ``"forward<float, float, 1>"``, for `arch` (sm_90).

    Raises:
        BuildError: the compiler rejected it.
    """
    from cuda.core import Program, ProgramOptions

    report = io.StringIO()
    options = ProgramOptions(
        arch=arch,
        std="c++17",
        include_path=[str(OPS)],
        define_macro=list(MACROS.items()),
        ptxas_options=["-v"],
        name=f"{op}.cu",
    )
    try:
        code = Program(sources()[op].read_text(), "c++", options).compile("cubin", name_expressions=[name], logs=report)
    except Exception as error:
        raise BuildError(
            f"NVRTC failed on {name} of {sources()[op]} for {arch}: {error}\n{report.getvalue()}"
        ) from error
    return Cubin(bytes(code.code), code.symbol_mapping[name], report.getvalue())


def cubin_name(op, name, arch):
    """File name of a compiled kernel, keyed by sources, template instance, architecture and NVRTC."""
    key = hashlib.sha256(repr([name, arch, MACROS, _nvrtc_version()]).encode())
    for path in [sources()[op], *sorted(OPS.glob("*.cuh"))]:
        key.update(path.read_bytes())
    return f"{op}-{arch}-{key.hexdigest()[:16]}.cubin"


def cubin(op, name, arch):
    """The `Cubin` of a template instance, from disk if compiled before; the file starts with a line of JSON."""

    def make(target):
        compiled = compile_kernel(op, name, arch)
        symbol = compiled.symbol.decode() if isinstance(compiled.symbol, bytes) else compiled.symbol
        target.write_bytes(json.dumps([symbol, compiled.report]).encode() + b"\n" + compiled.code)

    head, code = stored(cubin_name(op, name, arch), make).read_bytes().split(b"\n", 1)
    return Cubin(code, *json.loads(head))


def _kernel(op, name, arch):
    from cuda.core import ObjectCode

    compiled = cubin(op, name, arch)
    return ObjectCode.from_cubin(compiled.code, symbol_mapping={name: compiled.symbol.encode()}).get_kernel(name)


_loaded = {}


def loaded(op, name, arch):
    """The kernel, compiled and loaded at its first use.

    Raises:
        BuildError: it does not compile.
        RuntimeError: it is first used while a CUDA graph is captured.
    """
    if (op, name, arch) not in _loaded:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{op} {name}: the kernel is not loaded yet; run once before the capture of a CUDA graph"
            )
        _loaded[op, name, arch] = _kernel(op, name, arch)
    return _loaded[op, name, arch]


@functools.cache
def _arch(index):
    return "sm_{}{}".format(*_capability(index))


@functools.cache
def _capability(index):
    return torch.cuda.get_device_capability(index)


def unsupported(device, *tensors):
    """Why kernels cannot take `tensors` on `device`, or None. bfloat16 conversions need sm_80."""
    if device.type == "cuda" and any(x.dtype == torch.bfloat16 for x in tensors) and _capability(device.index) < (8, 0):
        return "bfloat16 kernels need a GPU of compute capability 8.0 or more, got {}.{}".format(
            *_capability(device.index)
        )
    return None


def has_tf32(device):
    """Whether a `torch.device` multiplies in tf32, from sm_80 on; devices other than CUDA count as an H100."""
    return device.type != "cuda" or _capability(device.index) >= (8, 0)


@functools.cache
def multiprocessors(device):
    """Number of multiprocessors of a `torch.device`; 132, as on an H100, for devices other than CUDA."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


TYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_DTYPES = {name: dtype for dtype, name in TYPES.items()} | {"int": torch.int32}
_KERNEL = re.compile(
    r"(?:template <([^>]*)>\s*)?__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(([^)]*)\)", re.DOTALL
)


class Parameter(NamedTuple):
    """A parameter of a kernel: the argument that gives its value and, for a stride, which stride of it."""

    name: str
    kind: str  # "pointer", "integer" or "float"
    dtype: torch.dtype | None  # of a pointer's target
    argument: str
    stride: int | None


@functools.cache
def parameters(op, name):
    """The parameters of template instance `name` of operator `op`, read from its signature in ``cuda.cu``.

    ``x_, x_batch, x_token`` is one argument, the tensor x and its first strides.
    """
    kernel, _, given = name.rstrip(">").partition("<")
    found = {m[2]: m for m in _KERNEL.finditer(sources()[op].read_text())}[kernel]
    types = dict(zip((t.split()[-1] for t in (found[1] or "").split(",")), given.split(", "), strict=False))
    declared = found[3].replace("__restrict__", "").replace("*", "* ").split(",")
    declared = [tuple(text.split()[-2:]) for text in declared]
    views, out, strides = [n[:-1] for _, n in declared if n.endswith("_")], [], {}
    for of, parameter in declared:
        if of.endswith("*"):
            of = of[:-1]
            argument = parameter.removesuffix("_")
            out.append(Parameter(parameter, "pointer", _DTYPES[types.get(of, of)], argument, None))
            continue
        view = next((v for v in views if parameter.startswith(f"{v}_")), None)
        stride = None if view is None else strides.setdefault(view, itertools.count()).__next__()
        kind = "integer" if of == "i64" else "float"
        out.append(Parameter(parameter, kind, None, view or parameter, stride))
    return tuple(out)


def arguments(op, name, **named):
    """The values of a kernel's parameters, in order: tensors as addresses (None is null), strides from their tensors.

    A stride may also be given by its own name. For None it is 0.

    Raises:
        TypeError: an argument is missing, unknown, or not of the parameter's kind or dtype.
    """
    values, used = [], set()
    for p in parameters(op, name):
        key = p.name if p.name in named else p.argument
        if key not in named:
            raise TypeError(f"{op} {name}: no argument {p.argument!r}")
        used.add(key)
        value, is_stride = named[key], p.stride is not None and key == p.argument
        if p.kind == "pointer" or is_stride:
            if not isinstance(value, torch.Tensor | None):
                raise TypeError(f"{op} {name}: {key} is a tensor or None, got {value!r}")
            if value is not None and p.dtype not in (None, value.dtype):
                raise TypeError(f"{op} {name}: {key} has elements of {p.dtype}, got {value.dtype}")
            if value is None:
                values.append(0)
            else:
                values.append(value.stride(p.stride) if is_stride else value.data_ptr())
        elif isinstance(value, int if p.kind == "integer" else int | float):
            values.append(int(value) if p.kind == "integer" else float(value))
        else:
            raise TypeError(f"{op} {name}: {key} is {p.kind}, got {value!r}")
    if unknown := named.keys() - used:
        raise TypeError(f"{op} {name}: unknown arguments {', '.join(sorted(unknown))}")
    return values


def launch(op, name, grid, block, **named):
    """Runs template instance `name` of operator `op` on the current stream of the first tensor's device.

    Args:
        op: Operator.
        name: Template instance, like ``"forward<float, float, 1>"``.
        grid: Blocks, along one dimension. With 0 nothing is launched.
        block: Threads of a block.
        named: The kernel's arguments, see `arguments`.

    Raises:
        BuildError: the kernel does not compile.
        RuntimeError: it is first used while a CUDA graph is captured.
        TypeError: arguments do not fit the kernel.
        ValueError: there are more blocks than CUDA allows.
    """
    from cuda.core import Device, LaunchConfig
    from cuda.core import launch as launch_kernel

    values = arguments(op, name, **named)
    if grid == 0:
        return
    if grid >= 2**31:
        raise ValueError(f"{op}: {grid} blocks are more than CUDA's 2^31 - 1; split the batch")
    device = next(a.device for a in named.values() if isinstance(a, torch.Tensor))
    with torch.cuda.device(device):
        Device(device.index).set_current()
        kernel = loaded(op, name, _arch(device.index))
        handle = torch.cuda.current_stream(device).cuda_stream or 1  # 0 and 1 both mean the default stream
        launch_kernel(_stream(handle), LaunchConfig(grid=grid, block=block), kernel, *values)


@functools.lru_cache(64)
def _stream(handle):
    from cuda.core import Stream

    return Stream.from_handle(handle)


def template(kernel, *parameters):
    """``template("forward", torch.float32, 4, True)`` is ``"forward<float, 4, true>"``."""

    def text(p):
        return TYPES[p] if isinstance(p, torch.dtype) else str(p).lower() if isinstance(p, bool) else str(p)

    return f"{kernel}<{', '.join(text(p) for p in parameters)}>"


def vector(most, *tensors):
    """Values along the last axis that one access can read from every tensor: `most`, or 1 if rows are not aligned."""
    for x in tensors:
        strides = [s for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
        misaligned = x.shape[-1] % most or any(s % most for s in strides)
        if x.dtype == torch.float64 or misaligned or x.data_ptr() % (most * x.element_size()):
            return 1
    return most


def channel_blocks(channels):
    """Number of blocks that share `channels` channels, and threads of each: a multiple of 32, at most `MAX_THREADS`."""
    blocks = -(-channels // MAX_THREADS)
    return blocks, -(-channels // (32 * blocks)) * 32


def order_arguments(order, shared_dims):
    """A scan order and its stride between samples: 0 if the batch shares it, that is if it has `shared_dims` axes."""
    return dict(order=order, order_batch=0 if order is None or order.dim() == shared_dims else order.stride(0))


def segments(steps, parallel, device, least=64, multiple=CHUNK):
    """How many segments to cut `steps` into so that `parallel` times as many threads fill the device.

    Returns:
        The number of segments, and the steps in each but the last: at least `least`, and a multiple of `multiple`.
    """
    wanted = max(multiprocessors(device) * 1024 // max(parallel, 1), 1)
    length = max(-(-steps // wanted), least)
    length = -(-length // multiple) * multiple
    return -(-steps // length), length


def precompile(instances, arch):
    """Compiles (operator, template instance) pairs for `arch` into the cache, in one fresh process per core.

    NVRTC takes 0.2 to 8 seconds per instance.

    Raises:
        BuildError: one does not compile.
    """
    jobs = [(op, name, arch) for op, name in instances]
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_compile_one, jobs):
            pass


def _compile_one(job):
    cubin(*job)


# Rank, vector and lanes of the selective scans of VMamba and GroupMamba (one state); states and rank for Vim.
ONE_STATE = ((6, 4, 8), (12, 4, 16), (24, 4, 32), (48, 4, 32), (1, 4, 4), (2, 4, 8), (6, 1, 32), (7, 4, 32))
SCANS = ((16, 12), (16, 24))


def scan_instances(dtype, one_state=ONE_STATE, scans=SCANS, ends=(False, True)):
    """Instances of the selective scan; those that join segments (`ends`) run only for small batches."""
    types = dtype, torch.float64 if dtype == torch.float64 else torch.float32
    out = [template(f"{k}_one", *types, *shape, True, e)
           for shape in one_state for k in ("forward", "backward") for e in ends]  # fmt: skip
    kernels = (("forward", False), ("backward",), *((("forward", True), ("adjoint_ends",)) if True in ends else ()))
    out += [template(kernel, *types, *shape, True, *flags) for shape in scans for kernel, *flags in kernels]
    return [("selective_scan", name) for name in out]


# wkv6 and wkv7 with heads of 64 channels, as in the published models.
WKV = (("forward6", 64), ("backward6", 64), ("forward7", 64), ("backward7", 64))


def mlstm_instances(width=4):
    """Instances of mlstm for heads of any size whose rows are read `width` channels at a time."""
    kernels = (("carry", False), ("carry", True), *(("apply", out) for out in range(4)), ("gates",))
    gates = ("maximum<8>", "maximum_backward<8>", "through_h<4>")
    return [("mlstm", name) for name in (*gates, *(template(*kernel, width) for kernel in kernels))]


def usual_instances(dtypes=(torch.float32, torch.bfloat16)):
    """(operator, template instance) pairs that are launched when the published models are trained."""
    out = []
    for dtype in dtypes:
        types = dtype, torch.float32
        out += scan_instances(dtype)
        for kernel in ("forward", "backward"):
            lanes = (4,) if kernel == "backward" else ()
            out += [("rational", template(kernel, *types, 4)), ("deform_conv", template(kernel, *types, 3, 4, *lanes))]
            out.append(("causal_conv1d", template(kernel, *types, 4, True)))
    for flag in (False, True):
        out.append(("selective_scan", template("carry", torch.float32, flag)))
        out += [("wkv", template(kernel, torch.float32, flag)) for kernel in ("bi_ends", "bi_carry", "bi_sweep")]
    out += [("wkv", template(*kernel)) for kernel in WKV] + mlstm_instances()
    return sorted(set(out))


def main(argv=None):
    """Compiles `usual_instances` for the given architecture (sm_90), or for that of the first GPU."""
    archs = (sys.argv[1:] if argv is None else argv) or [_arch(0)]
    for arch in archs:
        start = time.perf_counter()
        precompile(usual_instances(), arch)
        print(f"{arch}: {len(usual_instances())} kernels in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
