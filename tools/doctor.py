"""Reports what LinZoo finds on this machine: versions, the backend of each operator, and whether results are right."""

import argparse
import importlib.metadata
import platform
import time
import warnings

import rich.box
import rich.console
import rich.table
import torch

import linzoo.backbones
from linzoo.backbones.openmmlab_ops import stand_in
from linzoo.ops import backend_info, compile_cpu, compile_cuda, kernel_cache, onednn
from linzoo.ops.backend import resolve
from linzoo.ops.self_check import self_check

PACKAGES = (
    *("linzoo", "torch", "torchvision", "timm", "triton", "cuda-core"),
    *("onedl-mmengine", "onedl-mmcv", "onedl-mmpretrain", "onedl-mmsegmentation", "onedl-mmdetection"),
    *("onnx", "onnxscript", "onnxruntime", "diffusers"),
)
KERNELS = {"cpu": compile_cpu.sources, "cuda": compile_cuda.sources}  # the operators that have kernels
TOLERANCE = 1e-4  # relative to the largest value, in float32


def version(package):
    """Installed version of a distribution, or a dash."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def mmcv_operators():
    """Which operators mmdet's models run on, or why there are none."""
    try:
        return stand_in() or "none: mmcv is not installed"
    except ImportError as error:
        return f"none: {error}"


def cpu_kernels():
    """Where the CPU kernels come from."""
    held = [path for name in compile_cpu.sources() if (path := compile_cpu.prebuilt(name))]
    if held:
        return f"prebuilt for {held[0].parent.name}"
    try:
        return f"compiled at first use by {compile_cpu.find_compiler()}"
    except compile_cpu.BuildError as error:
        return str(error)


def matrix_products():
    """GFLOP/s of a float32 product on the CPU as PyTorch computes it, and by oneDNN."""
    if onednn.is_used():
        return f"{gflops():.0f} GFLOP/s by oneDNN (LINZOO_MATMUL)"
    if not torch.backends.mkldnn.is_available():
        return f"{gflops():.0f} GFLOP/s"
    ours = gflops()
    with onednn.use_onednn():
        theirs = gflops()
    hint = f"; LINZOO_MATMUL=onednn is {theirs / ours:.1f} times as fast" if theirs > 1.2 * ours else ""
    return f"{ours:.0f} GFLOP/s, by oneDNN {theirs:.0f}{hint}"


def gflops(m=2048, k=384, n=1536):
    """GFLOP/s of the fastest of several products of an m x k and a k x n matrix."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2e-9 * m * k * n / min(times)


def check(op, device):
    """The backend that runs `op` on `device`, its self-check, and whether that is good enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says why the reference runs
        try:
            backend, error = resolve(op, torch.device(device)), self_check(op, device)
        except RuntimeError as failure:
            return "none", f"failed: {failure}", False
    return backend, f"{'ok' if error <= TOLERANCE else 'WRONG'}, error {error:.0e}", error <= TOLERANCE


def main(argv=None):
    """Command line of `linzoo doctor`; exit status 1 if a self-check fails."""
    argparse.ArgumentParser(prog="linzoo doctor", description=__doc__).parse_args(argv)
    console = rich.console.Console(soft_wrap=True, highlight=False)
    facts = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "threads": str(torch.get_num_threads()),
        "matrix products": matrix_products(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu kernels": cpu_kernels(),
        "kernel cache": str(kernel_cache.cache_dir()),
        "models": str(len(linzoo.backbones.list_models())),
        "mmcv's operators": mmcv_operators(),
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:16}[/bold] {value}")

    table = rich.table.Table("operator", "device", "backend", "self-check", "why not faster", box=rich.box.SIMPLE)
    healthy = True
    for op, reasons in backend_info().items():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            if op not in KERNELS[device]():
                table.add_row(op, device, "torch", "-", "")  # PyTorch's own operators compute it
                continue
            backend, result, good = check(op, device)
            healthy &= good
            why = "" if backend == device else reasons[device] or f"{backend} is forced"
            table.add_row(op, device, backend, result, why)
        if not torch.cuda.is_available() and op in KERNELS["cuda"]():
            table.add_row(op, "cuda", "-", "-", f"no CUDA device; {reasons['cuda'] or 'kernel ready'}")
    console.print(table)
    return 0 if healthy else 1


if __name__ == "__main__":
    raise SystemExit(main())
