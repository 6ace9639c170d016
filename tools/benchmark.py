#!/usr/bin/env python
"""Times the zoo: `ops` each backend of an operator, `models` whole networks beside common baselines, `linfusion`
linear beside softmax attention, `quantized` 8-bit networks beside float32, `exports` the files of `linzoo export`
beside the network itself. `tables` prints what earlier runs wrote, as README shows it.

Everything that is compared is timed in turns within one run, so a busy moment of the machine hits all alike. The
median counts. The first line names the hardware, the software and the settings.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

from linzoo.backbones import list_models
from linzoo.ops import (
    bi_wkv,
    causal_conv1d,
    deform_conv,
    depthwise_conv2d,
    diagonal_scan,
    gated_delta,
    mlstm,
    nc_ssd,
    onednn,
    rational,
    scan_order,
    selective_scan,
    ssd,
    ssm_kernel,
    use_backend,
    wkv6,
    wkv7,
)
from linzoo.ops.selective_scan.reference import tokens_in_order, tokens_in_place
from linzoo.quantization.integer import pt2e, weight_only
from linzoo.tools import export
from linzoo.tools.models import create, family_of, measure

SWIN_TINY = "swin_tiny_patch4_window7_224"
BASELINES = (SWIN_TINY, "convnext_tiny", "deit_small_patch16_224")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- timing ---------------------------------------------------------------------------------------------------------


def environment(device, dtype="float32"):
    """The facts that a timing depends on, as a dictionary of strings and numbers."""
    facts = {"device": device, "dtype": dtype, "torch": torch.__version__, "timm": timm.__version__}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        facts["cpu"] = cpu_name()
        facts["threads"] = torch.get_num_threads()
        facts["matmul"] = "onednn" if onednn.is_used() else "torch"
        facts["allocator"] = allocator()
        facts["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return facts


def cpu_name():
    """The processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def allocator():
    """Which malloc serves this process, and how the environment sets it."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    name = next((x for x in ("jemalloc", "tcmalloc", "mimalloc") if x in loaded), " ".join(platform.libc_ver()))
    settings = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    return " ".join([name or "the system's", *settings])


def page_faults(call):
    """Pages that the system hands over during `call()`; None where it does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def seconds(call, device):
    """How long one call takes; on a GPU by events, after the cache has been overwritten."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def medians(calls, device, budget=2.0, least=3):
    """Median seconds of each of `calls`, `{name: function}`, timed in turns after two warm-up calls each.

    A call drops out once it has taken `budget` seconds, warm-up included, and was timed `least` times. If a
    call's repeats differ by more than a tenth of their median, a warning on stderr names it.
    """
    spent = {name: sum(seconds(call, device) for _ in range(2)) for name, call in calls.items()}
    times = {name: [] for name in calls}
    while pending := [n for n in calls if len(times[n]) < least or spent[n] < budget]:
        for name in pending:
            times[name].append(seconds(calls[name], device))
            spent[name] += times[name][-1]
    middle = {name: statistics.median(t) for name, t in times.items()}
    if unsteady := [name for name, t in times.items() if max(t) - min(t) > 0.1 * middle[name]]:
        names = ", ".join(" ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in unsteady)
        warn(f"repeats differ by more than 10 %: {names}")
    return middle


def warn(text):
    """A line on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def print_rows(title, facts, rows, columns, file):
    """Prints the environment and `rows` as a table of `columns`, `{heading: row -> text}`; adds it to `file`."""
    console = Console(width=None if Console().is_terminal else 170)
    console.print("  ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    table = Table(title=title)
    for i, heading in enumerate(columns):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)
    if file:
        write_tables(file, [*tables_of(file), {"title": title, "environment": facts, "rows": rows}])


def write_tables(file, tables):
    """Replaces `file` by `tables`, at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(tables, indent=1) + "\n")
    part.replace(file)


def tables_of(file):
    """The tables that earlier runs wrote to `file`; ValueError if it holds anything else."""
    tables = json.loads(file.read_text()) if file.exists() else []
    if not isinstance(tables, list) or any(not {"title", "environment", "rows"} <= set(t) for t in tables):
        raise ValueError("it holds no tables of this tool")
    return tables


# --- operators ------------------------------------------------------------------------------------------------------

# A case of an operator: `shape -> (call, leaves, floor)`. `call()` runs it as a model does, `leaves` are the tensors
# that receive gradients, and `floor()` does the work that no implementation can avoid. An operator's rivals on CUDA are
# other ways to the same result: `shape -> {name: (call, leaves)}`.


def selective_scan_case(device, B, L, G, D, N):
    """Cross-scan of a square map: G routes over the same channels, low-rank steps, outputs merged.

    The floor is the exponential of B L G D N elements: each state decays by one at each step.
    """
    call, leaves, _ = cross_scan(device, B, L, G, D, N)
    decays = torch.randn(B * L * G * D * N, device=device)
    out = torch.empty_like(decays)
    return call, leaves, lambda: torch.exp(decays, out=out)


def cross_scan(device, B, L, G, D, N, composed=False):
    """Two ways from the projections to the merged output, for `selective_scan_case`: by the operator alone, or
    `composed`: copies into scan order, 1-D scans, and a merge of their outputs.
    """
    side, rank = math.isqrt(L), math.ceil(D / 16)
    order = scan_order.cross(side, side).to(device)[:G]
    u = torch.randn(B, L, D, device=device)
    projected = torch.randn(B, L, G, rank + 2 * N, device=device)  # a model computes these with one projection
    A = -torch.rand(G, D, N, device=device) - 0.5
    skip, bias = torch.ones(G, D, device=device), torch.full((G, D), -4.0, device=device)
    weight = torch.randn(G, D, rank, device=device) * rank**-0.5
    leaves = [t.requires_grad_() for t in (u, projected, A, skip, weight, bias)]

    def call():
        shared, parameters = u.unsqueeze(2), dict(dt_weight=weight, dt_bias=bias)
        if composed:
            wide = tokens_in_order(shared.expand(B, L, G, D), order)
            dt, b, c = (x.contiguous() for x in tokens_in_order(projected, order).split([rank, N, N], -1))
            y = selective_scan(wide, dt, A, b, c, skip, **parameters)
            return tokens_in_place(y, order, L).sum(2)
        dt, b, c = projected.split([rank, N, N], -1)
        return selective_scan(shared, dt, A, b, c, skip, **parameters, order=order, merge=True)

    return call, leaves, order


def selective_scan_rivals(device, B, L, G, D, N):
    """The composition around our own 1-D scan, and the `mamba-ssm` package's scan of copies in scan order."""
    rivals = {"composition": cross_scan(device, B, L, G, D, N, composed=True)[:2]}
    with contextlib.suppress(ImportError):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

        u, delta = (torch.randn(B, G * D, L, device=device) for _ in range(2))
        b, c = (torch.randn(B, G, N, L, device=device) for _ in range(2))
        A, skip, bias = -torch.rand(G * D, N, device=device), *(torch.ones(G * D, device=device) for _ in range(2))
        leaves = [t.requires_grad_() for t in (u, delta, A, b, c, skip, bias)]
        rivals["mamba_ssm"] = functools.partial(selective_scan_fn, *leaves[:-1], None, bias, True), leaves
    return rivals


def causal_conv1d_case(device, B, L, G, C):
    """Vim's short convolution along both directions, 4 taps. The floor: a copy of the tokens."""
    x, order = torch.randn(B, L, G, C, device=device), torch.arange(L, device=device).expand(G, L).clone()
    order[1::2] = order[1::2].flip(1)
    leaves = [t.requires_grad_() for t in (x, torch.randn(G, C, 4, device=device), torch.randn(G, C, device=device))]
    values, out = x.detach(), torch.empty_like(x)
    return lambda: causal_conv1d(*leaves, order=order, activation="silu"), leaves, lambda: out.copy_(values)


def causal_conv1d_rivals(device, B, L, G, C):
    """The `causal-conv1d` package on tokens in scan order."""
    with contextlib.suppress(ImportError):
        from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

        x, weight = torch.randn(B, G * C, L, device=device), torch.randn(G * C, 4, device=device)
        leaves = [t.requires_grad_() for t in (x, weight, torch.randn(G * C, device=device))]
        return {"causal_conv1d": (lambda: causal_conv1d_fn(*leaves, activation="silu"), leaves)}
    return {}


def ssd_case(device, B, L, H, P, N, causal):
    """State-space duality of H heads. The floor: the two matrix products that write to the state and read from it."""
    x = torch.randn(B, L, H, P, device=device)
    b, c = (torch.randn(B, L, N, device=device) for _ in range(2))
    dt, A, skip = torch.rand(B, L, H, device=device), -torch.rand(H, device=device), torch.ones(H, device=device)
    leaves = [t.requires_grad_() for t in (x, b, c, dt, skip)] + ([A.requires_grad_()] if causal else [])
    write, values, read = b.detach().transpose(1, 2), x.detach().flatten(2), c.detach()

    def call():
        if causal:
            return ssd(x, dt, A, b.unsqueeze(2), c.unsqueeze(2), skip)
        return nc_ssd(x, dt, b, c, skip)

    return call, leaves, lambda: read @ (write @ values)


def mlstm_case(device, B, L, H, P):
    """mLSTM of H heads. The floor: the two matrix products that write to each head's memory and read from it."""
    q, k, v = (torch.randn(B, L, H, P, device=device).requires_grad_() for _ in range(3))
    i, f = (torch.randn(B, L, H, device=device).requires_grad_() for _ in range(2))
    read, write, values = (x.detach().transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: mlstm(q, k, v, i, f), [q, k, v, i, f], lambda: read @ (write.mT @ values)


def gated_delta_case(device, B, L, H, K, P):
    """Gated delta rule of H heads. The floor: the two matrix products that write to each head's memory and read it."""
    q, k = (torch.nn.functional.normalize(torch.randn(B, L, H, K, device=device), dim=-1) for _ in range(2))
    v, g, beta = (torch.randn(B, L, H, *axes, device=device) for axes in ((P,), (), ()))
    leaves = [x.requires_grad_() for x in (q, k, v, g.sigmoid().log(), beta.sigmoid())]
    read, write, values = (x.detach().transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: gated_delta(*leaves)[0], leaves, lambda: read @ (write.mT @ values)


def rational_case(device, B, L, C):
    """KAT's activation: one numerator, eight denominators. The floor: a copy of the activations."""
    x = torch.randn(B, L, C, device=device)
    leaves = [t.requires_grad_() for t in (x, torch.randn(1, 6, device=device), torch.randn(8, 4, device=device))]
    values, out = x.detach(), torch.empty_like(x)
    return lambda: rational(*leaves), leaves, lambda: out.copy_(values)


def deform_conv_case(device, B, H, W, C, G):
    """DCNv4; offsets and weights are slices of one projection. The floor: an ordinary depthwise 3x3 convolution."""
    x = torch.randn(B, H, W, C, device=device)
    packed = torch.randn(B, H, W, 27 * G + -27 * G % 8, device=device) / 4
    leaves = [t.requires_grad_() for t in (x, packed)]
    image, kernel = x.detach().permute(0, 3, 1, 2), torch.randn(C, 1, 3, 3, device=device)

    def call():
        taps = packed[..., : 27 * G].unflatten(-1, (G, 27))
        return deform_conv(x, taps[..., :18].unflatten(-1, (9, 2)), taps[..., 18:])

    return call, leaves, lambda: torch.nn.functional.conv2d(image, kernel, padding=1, groups=C)


def depthwise_conv2d_case(device, B, H, W, C, K, dilation):
    """A wide or dilated window, as in HRVMamba and Spatial-Mamba. The floor: a copy of the map."""
    x, reach = torch.randn(B, H, W, C, device=device), dilation * (K // 2)
    leaves = [t.requires_grad_() for t in (x, torch.randn(C, K, K, device=device) / K)]
    values, out = x.detach(), torch.empty_like(x)
    return lambda: depthwise_conv2d(*leaves, padding=reach, dilation=dilation), leaves, lambda: out.copy_(values)


def ssm_kernel_case(device, H, N, L, rank):
    """S4D's kernels, or S4's with that rank. The floor: the sum over modes as a matrix product, with given powers."""
    A = torch.stack([-torch.full((H, N), 0.5), math.pi * torch.arange(N).expand(H, N)], -1).to(device)
    B, C = torch.randn(H, N, 2, device=device), torch.randn(H, N, 2, device=device)
    dt, P = 0.001 * 100 ** torch.rand(H, device=device), torch.randn(max(rank, 1), H, N, 2, device=device)
    leaves = [t.requires_grad_() for t in (A, B, C, dt)] + ([P.requires_grad_()] if rank else [])
    sums, points = (2 * (1 + rank) ** 2, L // 2 + 1) if rank else (1, L)
    weights, powers = torch.randn(H, sums, 2 * N, device=device), torch.randn(H, 2 * N, points, device=device)

    def call():
        if rank:
            return ssm_kernel(A, B, C, dt, L, P=P, discretization="bilinear")
        return ssm_kernel(A, B, C, dt, L)

    return call, leaves, lambda: weights @ powers


def diagonal_scan_case(device, B, L, P):
    """S5's scan of P complex states. The floor: a copy of the inputs."""
    gain, b = torch.rand(P, 2, device=device) / 2, torch.randn(B, L, P, 2, device=device)
    leaves = [t.requires_grad_() for t in (gain, b)]
    values, out = b.detach(), torch.empty_like(b)
    return lambda: diagonal_scan(*leaves), leaves, lambda: out.copy_(values)


def bi_wkv_case(device, B, L, C):
    """Vision-RWKV's mixer. The floor: one exponential per step and channel."""
    k, v = (torch.randn(B, L, C, device=device) for _ in range(2))
    leaves = [t.requires_grad_() for t in (k, v, *(torch.randn(C, device=device) for _ in range(2)))]
    keys, out = k.detach(), torch.empty_like(k)
    return lambda: bi_wkv(*leaves, divide_by_length=True), leaves, lambda: torch.exp(keys, out=out)


def matrix_state_case(op, directions, device, B, L, C, N):
    """WKV with C / N states of N x N. The floor: the products that write to a state and read from it, each way."""
    heads = C // N
    vectors = {name: torch.randn(B, L, heads, N, device=device) for name in ("r", "k", "v", "a", "b", "w")}
    r, k, v, a, b, w = vectors.values()
    inputs = dict(r=r, k=k, v=v, w=w - 4)  # states remember some 50 steps
    inputs |= dict(u=torch.randn(heads, N, device=device)) if op is wkv6 else dict(a=a / N, b=b)
    leaves = [t.requires_grad_() for t in inputs.values()]
    write, values, read = k.detach().permute(0, 2, 3, 1), v.detach().transpose(1, 2), r.detach().transpose(1, 2)

    def floor():
        for _ in range(directions):
            torch.matmul(read, write @ values)

    return lambda: op(**inputs), leaves, floor


OPS = {
    "causal_conv1d": (
        causal_conv1d_case,
        [{"B": 4, "L": 197, "G": 2, "C": 384}, {"B": 1, "L": 4096, "G": 2, "C": 384}],
    ),
    "bi_wkv": (bi_wkv_case, [{"B": 1, "L": 4096, "C": 192}, {"B": 8, "L": 196, "C": 192}]),
    "deform_conv": (deform_conv_case, [{"B": 4, "H": 64, "W": 64, "C": 64, "G": 4}]),
    "depthwise_conv2d": (
        depthwise_conv2d_case,
        [
            {"B": 4, "H": 14, "W": 14, "C": 512, "K": 3, "dilation": 3},
            {"B": 4, "H": 56, "W": 56, "C": 16, "K": 9, "dilation": 1},
        ],
    ),
    "diagonal_scan": (diagonal_scan_case, [{"B": 8, "L": 1024, "P": 64}, {"B": 8, "L": 1024, "P": 384}]),
    "gated_delta": (
        gated_delta_case,
        [{"B": 1, "L": 4096, "H": 4, "K": 64, "P": 64}, {"B": 8, "L": 196, "H": 4, "K": 64, "P": 64}],
    ),
    "mlstm": (mlstm_case, [{"B": 1, "L": 3136, "H": 4, "P": 96}, {"B": 8, "L": 196, "H": 4, "P": 96}]),
    "rational": (rational_case, [{"B": 8, "L": 197, "C": 3072}]),
    "ssm_kernel": (
        ssm_kernel_case,
        [
            {"H": 128, "N": 32, "L": 1024, "rank": 0},
            {"H": 128, "N": 32, "L": 4096, "rank": 0},
            {"H": 128, "N": 32, "L": 1024, "rank": 1},
        ],
    ),
    "ssd": (
        ssd_case,
        [
            {"B": 1, "L": 3136, "H": 2, "P": 64, "N": 64, "causal": True},
            {"B": 1, "L": 3136, "H": 2, "P": 64, "N": 64, "causal": False},
            {"B": 8, "L": 784, "H": 4, "P": 64, "N": 64, "causal": False},
        ],
    ),
    "selective_scan": (
        selective_scan_case,
        [
            {"B": 1, "L": 3136, "G": 4, "D": 96, "N": 1},
            {"B": 8, "L": 3136, "G": 4, "D": 96, "N": 1},
            {"B": 1, "L": 3136, "G": 4, "D": 192, "N": 16},
            {"B": 1, "L": 784, "G": 4, "D": 192, "N": 1},
        ],
    ),
    "wkv6": (
        functools.partial(matrix_state_case, wkv6, 2),
        [{"B": 1, "L": 4096, "C": 192, "N": 64}, {"B": 8, "L": 196, "C": 192, "N": 64}],
    ),
    "wkv7": (functools.partial(matrix_state_case, wkv7, 1), [{"B": 1, "L": 4096, "C": 192, "N": 64}]),
}

# Shapes that fill a GPU; other operators are timed there with their CPU shapes.
CUDA_OPS = OPS | {
    "bi_wkv": (bi_wkv_case, [{"B": 1, "L": 16384, "C": 192}, {"B": 64, "L": 196, "C": 768}]),
    "causal_conv1d": (causal_conv1d_case, [{"B": 64, "L": 197, "G": 2, "C": 768}]),
    "deform_conv": (deform_conv_case, [{"B": 32, "H": 64, "W": 64, "C": 64, "G": 4}]),
    "diagonal_scan": (diagonal_scan_case, [{"B": 32, "L": 1024, "P": 384}]),
    "mlstm": (mlstm_case, [{"B": 8, "L": 3136, "H": 4, "P": 96}, {"B": 128, "L": 196, "H": 4, "P": 192}]),
    "rational": (rational_case, [{"B": 128, "L": 197, "C": 3072}]),
    "selective_scan": (
        selective_scan_case,
        [
            {"B": 64, "L": 3136, "G": 4, "D": 96, "N": 1},
            {"B": 64, "L": 784, "G": 4, "D": 192, "N": 1},
            {"B": 1, "L": 3136, "G": 4, "D": 96, "N": 1},
            {"B": 8, "L": 3136, "G": 4, "D": 192, "N": 16},
        ],
    ),
    "wkv6": (OPS["wkv6"][0], [{"B": 32, "L": 1024, "C": 768, "N": 64}]),
    "wkv7": (OPS["wkv7"][0], [{"B": 32, "L": 1024, "C": 768, "N": 64}]),
}
RIVALS = {"causal_conv1d": causal_conv1d_rivals, "selective_scan": selective_scan_rivals}

# Operators of linear cost. Their first shape is also timed at these lengths, on the device's backend only.
LENGTHS = dict.fromkeys(("bi_wkv", "gated_delta", "wkv6", "wkv7"), (1024, 2048, 4096, 8192, 16384))


def backward_ms(row, prefix=""):
    """Time of the backward pass: forward and backward together, less the forward pass."""
    return row[f"{prefix}both_ms"] - row[f"{prefix}forward_ms"]


OP_COLUMNS = {
    "shape": lambda r: " ".join(f"{k}{v}" for k, v in r["shape"].items()),
    "floor ms": lambda r: f"{r['floor_ms']:.2f}",
    "forward ms": lambda r: f"{r['forward_ms']:.2f}",
    "/ floor": lambda r: f"{r['forward_ms'] / r['floor_ms']:.2f}",
    "reference forward ms": lambda r: f"{r['reference_forward_ms']:.0f}",
    "/ ours": lambda r: f"{r['reference_forward_ms'] / r['forward_ms']:.0f}x",
    "forward + backward ms": lambda r: f"{r['both_ms']:.2f}",
    "backward / forward": lambda r: f"{backward_ms(r) / r['forward_ms']:.2f}",
    "reference both ms": lambda r: f"{r['reference_both_ms']:.0f}",
    "/ ours ": lambda r: f"{r['reference_both_ms'] / r['both_ms']:.0f}x",
    "reference backward / ours": lambda r: f"{backward_ms(r, 'reference_') / backward_ms(r):.1f}x",
    "largest error / std": lambda r: f"{r['error']:.1e}",
}


def op_row(case, shape, device, budget):
    """Times one shape on the device's own backend and on the reference, forward and forward + backward."""
    call, leaves, floor = case(device, **shape)
    with torch.no_grad():
        gradient = torch.randn_like(call())

    def on(backend, backward):
        def run():
            with use_backend(backend), torch.set_grad_enabled(backward):
                y = call()
                return torch.autograd.grad(y, leaves, gradient) if backward else y

        return run

    calls = {"floor": floor}
    for backend, name in ((device, ""), ("reference", "reference_")):
        calls |= {f"{name}forward": on(backend, False), f"{name}both": on(backend, True)}
    expected = calls["reference_forward"]()
    error = ((calls["forward"]() - expected).abs().max() / expected.std()).item()
    times = medians(calls, device, budget)
    return {"shape": shape, "error": error, **{f"{name}_ms": t * 1e3 for name, t in times.items()}}


COPY_BYTES = 2**30  # size of the copy that measures memory bandwidth: read and written


def cuda_op_row(case, rivals, shape, device, budget):
    """As `op_row`, with the bandwidth of the forward pass (each input read once, each output written once) against a
    copy of 1 GiB, the peak memory of forward and backward, and the rivals.
    """
    call, leaves, floor = case(device, **shape)
    with torch.no_grad():
        y = call()
    ways = {"": (call, leaves)} | {f"{name}_": way for name, way in rivals(device, **shape).items()}
    source = torch.empty(COPY_BYTES // (1 if device == "cuda" else 64), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"floor": floor, "copy": lambda: target.copy_(source)}
    for prefix, (way, inputs) in ways.items():
        with torch.no_grad():
            gradient = torch.randn_like(way())
        calls[f"{prefix}forward"] = torch.no_grad()(way)
        calls[f"{prefix}both"] = functools.partial(
            lambda f, x, g: torch.autograd.grad(f(), x, g), way, inputs, gradient
        )
    times = medians(calls, device, budget)

    # Once and cold: going step by step, the reference launches some twenty small kernels per step.
    with use_backend("reference"):
        expected = None

        def by_reference():
            nonlocal expected
            expected = calls["forward"]()

        times["reference_forward"] = seconds(by_reference, device)
    moved = sum(t.nbytes for t in (*leaves, y))
    row = {"shape": shape, "error": ((y - expected).abs().max() / expected.std()).item(), "bytes": moved}
    row |= {f"{name}_ms": t * 1e3 for name, t in times.items()}
    row["copy_gb_s"] = 2 * source.nbytes / times["copy"] / 1e9
    row["gb_s"] = moved / times["forward"] / 1e9
    if device == "cuda":
        row |= {f"{prefix}peak_bytes": peak_bytes(calls[f"{prefix}both"], device) for prefix in ways}
    return row


CUDA_COLUMNS = {
    "shape": OP_COLUMNS["shape"],
    "forward ms": lambda r: f"{r['forward_ms']:.3f}",
    "GB/s": lambda r: f"{r['gb_s']:.0f}",
    "of a copy": lambda r: f"{r['gb_s'] / r['copy_gb_s']:.0%}",
    "/ floor": OP_COLUMNS["/ floor"],
    "forward + backward ms": lambda r: f"{r['both_ms']:.3f}",
    "backward / forward": OP_COLUMNS["backward / forward"],
    "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in r else "-",
    "reference / ours": lambda r: f"{r['reference_forward_ms'] / r['forward_ms']:.0f}x",
    "largest error / std": OP_COLUMNS["largest error / std"],
}


def rival_columns(rows):
    """Each rival's times and memory, divided by ours."""
    names = sorted(
        {key.removesuffix("_both_ms") for r in rows for key in r if key.endswith("_both_ms")} - {"reference"}
    )
    fields = {"forward": "forward_ms", "both": "both_ms", "peak": "peak_bytes"}
    return {
        f"{name} / ours, {what}": lambda r, n=name, f=field: f"{r[f'{n}_{f}'] / r[f]:.1f}x" if f"{n}_{f}" in r else "-"
        for name in names
        for what, field in fields.items()
    }


LENGTH_COLUMNS = {
    "shape": OP_COLUMNS["shape"],
    "forward ms": lambda r: f"{r['forward_ms']:.2f}",
    "~ L^": lambda r: f"{r['forward_exponent']:.2f}",
    "forward + backward ms": lambda r: f"{r['both_ms']:.2f}",
    "~ L^ ": lambda r: f"{r['both_exponent']:.2f}",
}


def length_rows(case, shape, lengths, device, budget):
    """Times one shape at several lengths in turns, and fits the exponent of time against length."""
    calls = {}
    for length in lengths:
        call, leaves, _ = case(device, **{**shape, "L": length})
        with torch.no_grad():
            gradient = torch.randn_like(call())
        calls |= {
            ("forward", length): torch.no_grad()(call),
            ("both", length): lambda c=call, x=leaves, g=gradient: torch.autograd.grad(c(), x, g),
        }
    times = medians(calls, device, budget)
    rows = [{"shape": {**shape, "L": n}} | {f"{k}_ms": times[k, n] * 1e3 for k in ("forward", "both")} for n in lengths]
    slopes = {f"{k}_exponent": exponent(lengths, [times[k, n] for n in lengths]) for k in ("forward", "both")}
    return [row | slopes for row in rows]


def run_ops(args):
    """The `ops` part."""
    table = CUDA_OPS if args.device == "cuda" else OPS
    for name in args.op or table:
        case, shapes = table[name]
        facts, columns = environment(args.device), OP_COLUMNS
        if args.device == "cuda":
            rivals = RIVALS.get(name, lambda device, **shape: {})
            rows = [cuda_op_row(case, rivals, shape, args.device, args.budget) for shape in shapes]
            columns = CUDA_COLUMNS | rival_columns(rows)
        else:
            rows = [op_row(case, shape, args.device, args.budget) for shape in shapes]
        print_rows(f"{name}: {args.device} backend against the reference", facts, rows, columns, args.json)
        if name in LENGTHS:
            rows = length_rows(case, shapes[0], LENGTHS[name], args.device, args.budget)
            print_rows(f"{name}: time against length", facts, rows, LENGTH_COLUMNS, args.json)


# --- models ---------------------------------------------------------------------------------------------------------


def backbones():
    """The zoo's backbones, and the timm backbones that it adopts."""
    return list_models() + list_models(kind="adopted")


def network(name, size, args, compiled=False, checkpointed=False):
    """A pass of model `name` over a batch of random images: `(model, call)`."""
    model = create(name, size).to(args.device).train(args.train)
    if checkpointed:
        model.set_grad_checkpointing()
    run = torch.compile(model) if compiled else model
    x = torch.randn(args.batch, model.in_chans, size, size, device=args.device)
    half = args.dtype != "float32"

    def call():
        with torch.set_grad_enabled(args.train), torch.autocast(args.device, DTYPES[args.dtype], enabled=half):
            y = run(x)
        if args.train:
            sum(out.float().mean() for out in (y if isinstance(y, tuple) else (y,))).backward()

    return model, call


def by_onednn(call):
    """`call` with its matrix products by oneDNN."""

    def run():
        with onednn.use_onednn():
            call()

    return run


def operator_share(call, device):
    """The share of the time of `call()` spent inside `linzoo` operators, including everything they call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
    field = "device_time_total" if device == "cuda" else "cpu_time_total"
    events = list(profile.events() or ())
    whole = sum(getattr(e, f"self_{field}") for e in events)
    return sum(getattr(e, field) for e in events if is_ours(e) and not is_ours(e.cpu_parent)) / whole


def is_ours(event):
    """Whether a profiler event is a `linzoo` operator or lies inside one."""
    return event is not None and (event.name.startswith("linzoo") or is_ours(event.cpu_parent))


def peak_bytes(call, device):
    """Peak bytes that PyTorch allocated during a call, beyond those allocated before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    results = profile.profiler.kineto_results.events()
    events = sorted((e for e in results if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


def model_rows(names, size, args):
    """Times `names` in turns on images of one size."""
    networks = {name: network(name, size, args) for name in names}
    compiled = {f"{name} (compiled)": network(name, size, args, compiled=True) for name in names if args.compile}
    if args.checkpointing:
        networks |= {f"{name} (checkpointed)": network(name, size, args, checkpointed=True) for name in names}
    if args.onednn:
        networks |= {f"{name} (onednn)": (networks[name][0], by_onednn(networks[name][1])) for name in names}
    with torch._inductor.config.patch(force_disable_caches=True) if args.compile else contextlib.nullcontext():
        compile_seconds = {name: seconds(call, args.device) for name, (_, call) in compiled.items()}  # as if new here
    networks |= compiled
    times = medians({name: call for name, (_, call) in networks.items()}, args.device, args.budget)
    rows = []
    for name, (model, call) in networks.items():
        eager = name.partition(" (")[0]
        params, macs = measure(eager, size)
        stride = model.feature_info[0]["reduction"]
        row = {"model": name, "size": size, "tokens": math.ceil(size / stride) ** 2, "params": params, "macs": macs}
        row |= {"seconds": times[name], "images_per_s": args.batch / times[name]}
        row["operator_share"] = operator_share(call, args.device)
        row["peak_bytes"] = peak_bytes(call, args.device)
        row["page_faults"] = page_faults(call) if args.device == "cpu" else None
        if name != eager:
            row["of_eager"] = times[eager] / times[name]
        if name in compiled:
            row["compile_seconds"] = compile_seconds[name]
        rows.append(row)
    rates = {row["model"]: row["images_per_s"] * row["macs"] for row in rows}
    for row in rows:
        row["of_swin_tiny"] = rates[row["model"]] / rates[SWIN_TINY] if SWIN_TINY in rates else None
    return rows


def exponent(tokens, times):
    """Slope of log(time) against log(tokens), by least squares."""
    return statistics.linear_regression([math.log(t) for t in tokens], [math.log(t) for t in times]).slope


def model_columns(rows):
    """The columns for which the run has values."""
    columns = {
        "model": lambda r: r["model"],
        "size": lambda r: f"{r['size']}",
        "images/s": lambda r: f"{r['images_per_s']:.1f}",
        "ms / batch": lambda r: f"{r['seconds'] * 1e3:.1f}",
        "in our operators": lambda r: f"{r['operator_share']:.1%}",
        "params M": lambda r: f"{r['params'] / 1e6:.2f}",
        "GMACs": lambda r: f"{r['macs'] / 1e9:.2f}",
    }
    columns["peak MiB"] = lambda r: f"{r['peak_bytes'] / 2**20:.0f}"
    if any(r["page_faults"] for r in rows):
        columns["page faults"] = lambda r: f"{r['page_faults']}"
    if any(r["of_swin_tiny"] for r in rows):
        columns["MACs/s of swin_tiny's"] = lambda r: f"{r['of_swin_tiny']:.2f}"
    if any("of_eager" in r for r in rows):
        columns["speed of eager's"] = lambda r: f"{r['of_eager']:.2f}" if "of_eager" in r else ""
    if any("compile_seconds" in r for r in rows):
        columns["first call s"] = lambda r: f"{r['compile_seconds']:.0f}" if "compile_seconds" in r else ""
    if any("exponent" in r for r in rows):
        columns["tokens"] = lambda r: f"{r['tokens']}"
        columns["time ~ tokens^"] = lambda r: f"{r['exponent']:.2f}"
    return columns


def run_models(args):
    """The `models` part."""
    names = list(args.models)
    if args.family:
        names += [n for n in backbones() if family_of(n) in args.family]
        names += [n for n in BASELINES if n not in names]
    facts = environment(args.device, args.dtype) | {"batch": args.batch, "pass": "train" if args.train else "inference"}
    rows = [row for size in args.sizes for row in model_rows(names, size, args)]
    timed = list(dict.fromkeys(row["model"] for row in rows))  # models and their variants
    timed.sort(key=lambda name: names.index(name.partition(" (")[0]))
    for name in timed if len(args.sizes) > 1 else ():
        own = [r for r in rows if r["model"] == name]
        slope = exponent([r["tokens"] for r in own], [r["seconds"] for r in own])
        for row in own:
            row["exponent"] = slope
    rows.sort(key=lambda r: timed.index(r["model"]))
    print_rows("models", facts, rows, model_columns(rows), args.json)
    if args.picture:
        draw_models(rows, args)


def draw_models(rows, args):
    """Plots seconds and peak memory per image against pixels, one line per model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        pixels = [row["size"] ** 2 for row in own]
        time_axes.plot(pixels, [1 / row["images_per_s"] for row in own], marker="o", label=name)
        memory_axes.plot(pixels, [row["peak_bytes"] / args.batch / 2**30 for row in own], marker="o", label=name)
    time_axes.set_ylabel("seconds an image")
    memory_axes.set_ylabel("peak GiB an image, beside the weights")
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", yscale="log", xlabel="pixels")
        axes.set_xticks([size**2 for size in args.sizes], [f"{size}²" for size in args.sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="both", alpha=0.3)
    time_axes.legend(fontsize="small")
    figure.suptitle(f"{'Training step' if args.train else 'Inference'}, {args.dtype}, {args.device}")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)


# --- LinFusion ------------------------------------------------------------------------------------------------------

LARGEST_SCORES = 2**30  # bytes of the largest attention score matrix that is tried


def attention_calls(tokens, args):
    """Ways to compute one self-attention of a UNet without gradient: for each name, a call on that many tokens."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    from linzoo.generate.linfusion import LinearAttention

    x = torch.randn(args.batch, tokens, args.dim, device=args.device)
    processors = {"linear": LinearAttention(args.dim, args.dim), "softmax": AttnProcessor2_0()}
    if 4 * args.batch * args.heads * tokens**2 <= LARGEST_SCORES:
        processors["scores"] = AttnProcessor()
    sizes = dict(heads=args.heads, dim_head=args.dim // args.heads)
    layers = {name: Attention(args.dim, **sizes, processor=p).to(args.device) for name, p in processors.items()}
    return {name: functools.partial(torch.no_grad()(layer), x) for name, layer in layers.items()}


ATTENTION_COLUMNS = {
    "tokens": lambda r: f"{r['tokens']}",
    "linear ms": lambda r: f"{r['linear_ms']:.1f}",
    "~ L^": lambda r: f"{r['linear_exponent']:.2f}",
    "softmax ms": lambda r: f"{r['softmax_ms']:.1f}",
    "~ L^ ": lambda r: f"{r['softmax_exponent']:.2f}",
    "softmax / linear": lambda r: f"{r['softmax_ms'] / r['linear_ms']:.1f}x",
    "linear MiB": lambda r: f"{r['linear_bytes'] / 2**20:.0f}",
    "softmax MiB": lambda r: f"{r['softmax_bytes'] / 2**20:.0f}",
    "with scores MiB": lambda r: f"{r['scores_bytes'] / 2**20:.0f}" if "scores_bytes" in r else "-",
}


def run_linfusion(args):
    """The `linfusion` part: softmax is PyTorch's fused attention; "with scores" builds the L x L matrix."""
    calls = {n: attention_calls(n, args) for n in args.tokens}
    timed = {(name, n): call for n, ways in calls.items() for name, call in ways.items() if name != "scores"}
    times = medians(timed, args.device, args.budget)
    rows = []
    for n, ways in calls.items():
        row = {"tokens": n} | {f"{name}_ms": times[name, n] * 1e3 for name in ("linear", "softmax")}
        rows.append(row | {f"{name}_bytes": peak_bytes(call, args.device) for name, call in ways.items()})
    for name in ("linear", "softmax"):
        slope = exponent(args.tokens, [times[name, n] for n in args.tokens])
        for row in rows:
            row[f"{name}_exponent"] = slope
    facts = environment(args.device) | {"batch": args.batch, "dim": args.dim, "heads": args.heads}
    print_rows("linfusion: one self-attention, forward", facts, rows, ATTENTION_COLUMNS, args.json)


# --- quantised networks ---------------------------------------------------------------------------------------------

QUANTIZED_COLUMNS = {
    "model": lambda r: r["model"],
    "arithmetic": lambda r: r["arithmetic"],
    "images/s": lambda r: f"{r['images_per_s']:.2f}",
    "/ float32": lambda r: f"{r['speedup']:.2f}x",
    "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
    "relative error": lambda r: f"{r['error']:.4f}",
    "made in s": lambda r: f"{r['preparation_s']:.0f}",
}


def saved_bytes(model):
    """Bytes of the file that `torch.save` writes for the weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def arithmetics(model, calibration, compile_float):
    """Ways to run a model: for each name, a function that makes the copy, and the images' dtype; compiled ones last."""

    def compiled(made):
        with torch._inductor.config.patch(freezing=True):
            run = torch.compile(made)
            run(calibration)
        return made, run

    def eager(made):
        return made, made

    ways = {
        "float32": (lambda: eager(model), torch.float32),
        "bfloat16": (lambda: eager(copy.deepcopy(model).bfloat16()), torch.bfloat16),
        "8-bit weights (torchao)": (lambda: eager(weight_only(model)), torch.float32),
    }
    if compile_float:
        ways["float32, compiled"] = lambda: compiled(copy.deepcopy(model)), torch.float32
    ways["8-bit PT2E, compiled"] = lambda: compiled(pt2e(model, [calibration])), torch.float32
    return ways


@torch.no_grad()
def quantized_rows(name, args):
    """Prepares every arithmetic of one model, reports it on stderr, and times them in turns."""
    torch.manual_seed(0)
    model = create(name, args.size).eval()
    calibration, x = torch.randn(2, args.batch, model.in_chans, args.size, args.size)
    calls, rows = {}, {}
    for arithmetic, (make, dtype) in arithmetics(model, calibration, args.compile).items():
        begin = time.perf_counter()
        made, run = make()
        took = time.perf_counter() - begin
        calls[arithmetic] = functools.partial(torch.no_grad()(run), x.to(dtype))
        expected = model(x)
        error = float((calls[arithmetic]().float() - expected).norm() / expected.norm())
        rows[arithmetic] = {"bytes": saved_bytes(made), "error": error, "preparation_s": took}
        print(f"{name}, {arithmetic}: made in {took:.0f} s, relative error {error:.4f}", file=sys.stderr, flush=True)
    times = medians(calls, "cpu", args.budget)
    return [
        {"model": name, "arithmetic": arithmetic, "images_per_s": args.batch / times[arithmetic]}
        | {"speedup": times["float32"] / times[arithmetic]}
        | row
        for arithmetic, row in rows.items()
    ]


def run_quantized(args):
    """The `quantized` part, on random weights and images. The error is relative: norm over norm, of the logits."""
    facts = environment("cpu") | {"instructions": torch.backends.cpu.get_cpu_capability()}
    facts |= {"vnni": torch.cpu._is_vnni_supported(), "batch": args.batch, "size": args.size}
    for name in args.models:
        print_rows(f"quantized: {name}", facts, quantized_rows(name, args), QUANTIZED_COLUMNS, args.json)


# --- exported networks ----------------------------------------------------------------------------------------------

EXPORT_COLUMNS = {
    "model": lambda r: r["model"],
    "format": lambda r: r["format"],
    "of any length": lambda r: r["axes"] or "none",
    "error / std": lambda r: f"{r['error']:.0e}" if "error" in r else r["reason"],
    "at another size": lambda r: f"{r['other_error']:.0e}" if "other_error" in r else "-",
    "written in s": lambda r: f"{r['written_s']:.0f}",
    "file ms": lambda r: f"{r['file_ms']:.1f}" if "file_ms" in r else "-",
    "model / file": lambda r: f"{r['model_ms'] / r['file_ms']:.2f}x" if "file_ms" in r else "-",
}


def smallest_of_families():
    """The classifier with the fewest weights of each family."""
    found = {}
    for name in list_models():
        size = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
        found[family_of(name)] = min(found.get(family_of(name), (size, name)), (size, name))
    return sorted(name for _, name in found.values())


def exported(model, form, scan, size, axes, folder, budget):
    """Writes a network and times the file. Returns what is known up to the first step that fails."""
    places = {"batch": 0, "height": 2, "width": 3}
    write, file = export.FORMATS[form]
    x, row, begin = torch.randn(2, model.in_chans, size, size), {"axes": ",".join(axes)}, time.perf_counter()
    sides = [size + 64 if axis in axes else size for axis in ("height", "width")]
    try:
        options = {"scan": scan} if form == "onnx" else {}
        run = write(model, x, {places[axis]: torch.export.Dim.AUTO for axis in axes}, folder / file, **options)
        row["written_s"] = time.perf_counter() - begin
        row["error"] = export.compare(run, model, x)[0]
        if axes:
            row["other_error"] = export.compare(run, model, torch.randn(3, model.in_chans, *sides))[0]
    except Exception as e:  # a tracer or a runtime may raise anything
        return row | {"reason": type(e).__name__, "written_s": row.get("written_s", time.perf_counter() - begin)}
    calls = {"file": functools.partial(run, x), "model": functools.partial(torch.no_grad()(model), x)}
    return row | {f"{name}_ms": s * 1e3 for name, s in medians(calls, "cpu", budget).items()}


def run_exports(args):
    """The `exports` part: the most dynamic axes for which a file is right, on random weights and images.

    The JSON file is written anew for each row: a run that is stopped keeps its rows.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    facts, rows = environment("cpu") | {"batch": 2, "size": args.size, "scan": args.scan}, []
    earlier = tables_of(args.json) if args.json else []
    for name in args.models or smallest_of_families():
        torch.manual_seed(0)
        fixed = args.scan == "chunked" or timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
        model = create(name, args.size).eval()
        for form in args.formats:
            for axes in [["batch"], []] if fixed else [["batch", "height", "width"], ["batch"], []]:
                with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row = exported(model, form, args.scan, args.size, axes, Path(folder), args.budget)
                errors = [row.get(key, 0) for key in ("error", "other_error")]
                row |= {} if max(errors) <= export.TOLERANCE else {"reason": "wrong"}
                print(f"{name}, {form}, {row['axes']}: {row.get('reason', 'right')}", file=sys.stderr, flush=True)
                if "reason" not in row:
                    break
            rows.append({"model": name, "format": form} | row)
            if args.json:
                write_tables(args.json, [*earlier, {"title": "exports", "environment": facts, "rows": rows}])
    print_rows("exports", facts, rows, EXPORT_COLUMNS, None)


# --- README's tables ------------------------------------------------------------------------------------------------


def markdown(columns, rows):
    """A Markdown table of `columns`, `{heading: row -> text}`."""
    lines = [
        list(columns),
        ["---", *["---:"] * (len(columns) - 1)],
        *([cell(r) for cell in columns.values()] for r in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def operator_markdown(tables):
    """All operators against their references, in one table."""
    rows = [{**row, "operator": t["title"].partition(":")[0]} for t in tables for row in t["rows"]]
    columns = {
        "operator": lambda r: f"`{r['operator']}`",
        "shape": OP_COLUMNS["shape"],
        "forward ms": OP_COLUMNS["forward ms"],
        "reference / ours": lambda r: OP_COLUMNS["/ ours"](r).removesuffix("x"),
        "ours / floor": lambda r: f"{r['forward_ms'] / r['floor_ms']:.1f}",
        "backward / forward": lambda r: f"{backward_ms(r) / r['forward_ms']:.1f}",
        "reference / ours, both": lambda r: OP_COLUMNS["/ ours "](r).removesuffix("x"),
    }
    return markdown(columns, rows)


def length_markdown(tables):
    """Exponents of time against length, a row for each operator."""
    rows = [{**t["rows"][-1], "operator": t["title"].partition(":")[0], "first": t["rows"][0]} for t in tables]
    columns = {
        "operator": lambda r: f"`{r['operator']}`",
        "steps": lambda r: f"{r['first']['shape']['L']} to {r['shape']['L']}",
        "forward ~ L^": LENGTH_COLUMNS["~ L^"],
        "with backward ~ L^": LENGTH_COLUMNS["~ L^ "],
    }
    return markdown(columns, rows)


EAGER_CELLS = {  # by heading: the field that it needs, and its text
    "images/s": ("images_per_s", lambda r: f"{r['images_per_s']:.1f}"),
    "of swin_tiny's MACs/s": ("of_swin_tiny", lambda r: f"{r['of_swin_tiny']:.2f}"),
}
TRAIN_CELLS = EAGER_CELLS | {"peak MiB": ("peak_bytes", lambda r: f"{r['peak_bytes'] / 2**20:.0f}")}
COMPILED_CELLS = {
    "compiled images/s": ("images_per_s", lambda r: f"{r['images_per_s']:.1f}"),
    "of eager's": ("of_eager", lambda r: f"{r['of_eager']:.2f}"),
    "first call s": ("compile_seconds", lambda r: f"{r['compile_seconds']:.0f}"),
}
ONEDNN_CELLS = {"by oneDNN": EAGER_CELLS["images/s"]}
CHECKPOINTED_CELLS = {
    "checkpointed images/s": EAGER_CELLS["images/s"],
    "checkpointed peak MiB": TRAIN_CELLS["peak MiB"],
}
VARIANT_CELLS = {"compiled": COMPILED_CELLS, "onednn": ONEDNN_CELLS, "checkpointed": CHECKPOINTED_CELLS}


def model_markdown(tables):
    """Runs over the same models: a row for each model, columns for each size of each run."""
    rows, columns = {}, {}  # rows: by model, what each (run, size, variant) gave
    for run, table in enumerate(tables):
        train, batch = table["environment"]["pass"] == "train", table["environment"]["batch"]
        for row in table["rows"]:
            name, _, variant = row["model"].rstrip(")").partition(" (")
            rows.setdefault(name, {})[run, row["size"], variant] = row
        kept = "MALLOC_MMAP_THRESHOLD_" in table["environment"].get("allocator", "")
        onednn_too = any("(onednn)" in row["model"] for row in table["rows"])
        eager = {"images/s": EAGER_CELLS["images/s"]} if onednn_too else TRAIN_CELLS if train else EAGER_CELLS
        for key, row in next(iter(rows.values())).items():
            cells = VARIANT_CELLS.get(key[2], eager)
            where = f"{batch} x {key[1]} px" + ", training" * (train and onednn_too) + ", memory kept" * kept
            for heading, (field, text) in cells.items():
                if key[0] == run and row.get(field) is not None:
                    columns[f"{heading}, {where}"] = lambda r, key=key, text=text: text(r[1][key])
        if "exponent" in table["rows"][0]:
            columns["time ~ tokens^"] = lambda r, key=key: f"{r[1][key]['exponent']:.2f}"
    first = {"model": lambda r: f"`{r[0]}`", "GMACs": lambda r: f"{next(iter(r[1].values()))['macs'] / 1e9:.2f}"}
    return markdown(first | columns, rows.items())


def run_tables(args):
    """The `tables` part."""
    kinds = {}
    for table in tables_of(args.file):
        kind = table["title"].partition(": ")[2]
        if table["title"] == "models":  # runs of training over the same models, or by oneDNN, stand side by side
            kind = tuple(row["model"] for row in table["rows"])
            alike = "train" if table["environment"]["pass"] == "train" else len(kinds)
            kind = (*kind, "onednn" if any("(onednn)" in name for name in kind) else alike)
        kinds.setdefault(kind, []).append(table)
    makers = {"cpu backend against the reference": operator_markdown, "time against length": length_markdown}
    for kind, tables in kinds.items():
        if make := model_markdown if isinstance(kind, tuple) else makers.get(kind):
            print(make(tables), end="\n\n")


# --- command line ---------------------------------------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    ops = parts.add_parser("ops", help="operators, against the reference and a floor")
    ops.add_argument("--op", nargs="+", action="extend", choices=list(CUDA_OPS), help="default: all of them")
    models = parts.add_parser("models", help="networks: images/s, share of our operators, parameters, MACs")
    models.add_argument("--models", nargs="+", default=[], metavar="NAME", help="names registered with timm")
    models.add_argument(
        "--family", nargs="+", default=[], help="all models of these families, plus " + ", ".join(BASELINES)
    )
    models.add_argument("--sizes", "--size", nargs="+", type=int, default=[224], help="sides of the square images")
    models.add_argument("--batch", type=int, default=4)
    models.add_argument("--dtype", choices=list(DTYPES), help="autocast dtype (default: float32; on CUDA bfloat16)")
    models.add_argument("--train", action="store_true", help="forward and backward in training mode")
    models.add_argument("--checkpointing", action="store_true", help="also train with activation checkpointing")
    models.add_argument("--onednn", action="store_true", help="also time each model under use_onednn")
    models.add_argument("--compile", action="store_true", help="also time each model under torch.compile")
    models.add_argument(
        "--picture", type=Path, metavar="FILE", help="plot time and memory against pixels; needs several sizes"
    )
    linfusion = parts.add_parser("linfusion", help="LinFusion's attention against softmax, by the number of tokens")
    linfusion.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    linfusion.add_argument("--batch", type=int, default=1)
    linfusion.add_argument("--dim", type=int, default=320, help="channels (default: Stable Diffusion's first level)")
    linfusion.add_argument("--heads", type=int, default=8)
    quantized = parts.add_parser("quantized", help="networks in float32, bfloat16 and 8 bits, on the CPU")
    quantized.add_argument(
        "--models", nargs="+", required=True, metavar="NAME", help="classifiers registered with timm"
    )
    quantized.add_argument("--size", type=int, default=224, help="side of the square images")
    quantized.add_argument("--batch", type=int, default=4)
    quantized.add_argument("--compile", action="store_true", help="also time float32 under torch.compile")
    exports = parts.add_parser("exports", help="files of `linzoo export`: axes, errors and times beside the networks")
    exports.add_argument("--models", nargs="+", metavar="NAME", help="default: each family's smallest")
    exports.add_argument("--formats", nargs="+", choices=["onnx", "torch", "aoti"], default=["onnx", "torch"])
    exports.add_argument("--scan", choices=list(export.SCANS), default="loop", help="form of scans in ONNX")
    exports.add_argument("--size", type=int, default=64, help="side of the square images")
    exports.add_argument("--threads", type=int, help="of torch and ONNX Runtime; default: torch's own")
    tables = parts.add_parser("tables", help="Markdown of what runs of `ops` and `models` on a CPU wrote")
    tables.add_argument("file", type=Path, help="from --json")
    quantized.set_defaults(device="cpu")
    exports.set_defaults(device="cpu")
    tables.set_defaults(device="cpu", json=None)
    for part in (ops, models, linfusion):
        part.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for part in (ops, models, linfusion, quantized, exports):
        part.add_argument("--budget", type=float, default=2.0, metavar="S", help="seconds per timing")
        part.add_argument("--json", type=Path, metavar="FILE", help="add the results to this JSON file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.part == "models" and args.checkpointing and not args.train:
        parser.error("--checkpointing: expected with --train")
    if args.part == "models" and args.onednn and args.device != "cpu":
        parser.error("--onednn: expected with --device cpu")
    if args.json:
        try:
            tables_of(args.json)
        except (OSError, TypeError, ValueError) as e:
            parser.error(f"--json: cannot add to {str(args.json)!r}: {e}")
    if args.part == "tables":
        try:
            tables_of(args.file.resolve(strict=True))
        except (OSError, TypeError, ValueError) as e:
            parser.error(f"file: cannot read {str(args.file)!r}: {e}")
    if args.part == "models":
        families = sorted({family_of(n) for n in backbones()})
        wrong = [n for n in args.models if not timm.is_model(n)], [f for f in args.family if f not in families]
        if wrong[0]:
            parser.error(f"--models: timm knows no {', '.join(wrong[0])}")
        if wrong[1]:
            parser.error(f"--family: no {', '.join(wrong[1])}; the zoo has {', '.join(families)}")
        if not (args.models or args.family):
            parser.error("name models by --models or --family")
        if args.batch < 1 or min(args.sizes) < 1:
            parser.error("--batch and --sizes must be positive")
        if args.picture and len(args.sizes) < 2:
            parser.error(f"--picture {str(args.picture)!r}: expected two --sizes or more to draw")
        args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    elif args.part == "quantized":
        if importlib.util.find_spec("torchao") is None:
            parser.error("quantized needs torchao: pip install 'linzoo[quantize]'")
        if wrong := [n for n in args.models if not timm.is_model(n)]:
            parser.error(f"--models: timm knows no {', '.join(wrong)}")
        if min(args.batch, args.size) < 1:
            parser.error("--batch and --size must be positive")
    elif args.part == "exports":
        if importlib.util.find_spec("onnxruntime") is None:
            parser.error("exports needs onnxruntime: pip install 'linzoo[export]'")
        if wrong := [n for n in args.models or () if not timm.is_model(n)]:
            parser.error(f"--models: timm knows no {', '.join(wrong)}")
        if args.size < 1:
            parser.error("--size must be positive")
        if args.threads is not None and args.threads < 1:
            parser.error(f"--threads {args.threads}: expected a positive number")
    elif args.part == "linfusion":
        if importlib.util.find_spec("diffusers") is None:
            parser.error("linfusion needs diffusers: pip install 'linzoo[generate]'")
        if len(set(args.tokens)) < 2 or min(*args.tokens, args.batch, args.heads) < 1 or args.dim % args.heads:
            parser.error("expected two numbers of --tokens, positive sizes, and --heads that divide --dim")
    return args


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler reports a missing GPU as an error
    args = parse(argv)
    load = environment(args.device).get("load") or 0
    if load > torch.get_num_threads() and args.part != "tables":
        warn(f"the machine is busy: a load of {load:.1f} on {torch.get_num_threads()} threads")
    parts = {"ops": run_ops, "models": run_models, "linfusion": run_linfusion}
    parts |= {"quantized": run_quantized, "exports": run_exports, "tables": run_tables}
    parts[args.part](args)


if __name__ == "__main__":
    main()
