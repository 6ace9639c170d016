#!/usr/bin/env python
"""Reads the machine code that NVRTC makes of the CUDA kernels, without a GPU, and says what a step costs.

Each line is a template instance. `instr` (instructions), `mufu` (special functions), `lds` (shared memory), `shfl` and
`mma` (tensor cores) are counts in the hot loop, the largest loop that writes, per element: a step of a channel, of a
head for wkv6 and wkv7. Every branch counts, so they are upper bounds. Inner loops count as often as KERNELS below says,
else once. `load` and `store` are the narrowest and widest accesses of global memory in the hot loop, in bytes. `warps`
is how many fit a multiprocessor of an H100.

With --model: times predicted for an H100 from these figures, by bound; and what `ssd` and `nc_ssd`, which have no
kernel, move there. None of them is measured.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linzoo.ops import compile_cuda, nc_ssd, ssd
from linzoo.ops.compile_cuda import template
from linzoo.ops.mlstm import cuda as mlstm_cuda
from linzoo.ops.mlstm import reference as mlstm_reference
from linzoo.ops.selective_scan import cuda

REMEDY = "install the CUDA toolkit, `pip install nvidia-cuda-nvdisasm`, or PyTorch's triton, which has it, too"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "F32x4": 16}


class Instruction(NamedTuple):
    """An instruction of SASS: its address, name with modifiers, operands, and the address it may jump to."""

    address: int
    name: str
    operands: str
    target: int | None

    @property
    def bytes(self) -> int:
        """Bytes that a thread reads or writes, if it is a memory access."""
        parts = self.name.split(".")
        return next((n for key, n in _BYTES.items() if key in parts), 4)


class Sass(NamedTuple):
    """A kernel's machine code and resources; spills are bytes of stores and loads together."""

    code: list[Instruction]
    registers: int
    spills: int
    shared: int

    def loops(self) -> list[list[Instruction]]:
        """The bodies of all loops, in order of their start: the code between a backward jump and its target."""
        last = {}
        for jump in self.code:
            if jump.target is not None and jump.target < jump.address:  # a jump after the end targets itself
                last[jump.target] = jump.address
        return [[i for i in self.code if first <= i.address <= last[first]] for first in sorted(last)]

    def loop(self) -> list[Instruction]:
        """The largest loop that writes to global memory, else the largest loop, else all of the code."""
        bodies = self.loops()
        bodies = [b for b in bodies if any(_is(i, *STORES) for i in b)] or bodies or [self.code]
        return max(bodies, key=len)

    def executed(self, trips: tuple[float, ...] = ()) -> list[tuple[Instruction, float]]:
        """The instructions of the hot loop, each with how often an iteration runs it.

        Args:
            trips: How often each inner loop runs, in order of their start; once each if empty.

        Raises:
            ValueError: the number of inner loops differs.
        """
        loop = self.loop()
        inside = [b for b in self.loops() if loop[0].address <= b[0].address and b[-1].address <= loop[-1].address]
        inside = [b for b in inside if len(b) < len(loop)]
        if trips and len(trips) != len(inside):
            sizes = ", ".join(str(len(b)) for b in inside)
            raise ValueError(
                f"trips: expected one for each of {len(inside)} loops (of {sizes} instructions), got {trips}"
            )
        times = dict.fromkeys((i.address for i in loop), 1.0)
        for body, n in zip(inside, trips, strict=False):
            for i in body:
                times[i.address] *= n
        return [(i, times[i.address]) for i in loop]


STORES = ("STG", "RED", "ATOMG", "ATOM")


def _is(instruction: Instruction, *names: str) -> bool:
    return instruction.name.split(".")[0] in names


def count(code: list[Instruction], *names: str) -> int:
    """Number of instructions with these names; of all instructions if no names are given."""
    return sum(_is(i, *names) for i in code) if names else len(code)


def widths(code: list[Instruction], *names: str) -> list[int]:
    """Bytes per thread of every access with these names."""
    return [i.bytes for i in code if _is(i, *names)]


def disassembler() -> str:
    """Path of nvdisasm: on PATH, in the CUDA packages of PyPI, or in triton, which comes with PyTorch for CUDA.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = [Path(p) for p in sys.path if p]
    found = [shutil.which("nvdisasm")]
    for pattern in ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm"):
        found += [str(path) for folder in folders for path in sorted(folder.glob(pattern))]
    for path in found:
        if path and os.access(path, os.X_OK):
            return path
    raise FileNotFoundError(f"nvdisasm is not installed: {REMEDY}")


def resources(report: str) -> dict[str, int]:
    """Registers, spills and shared memory from the compiler's report."""

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found[1]) if found else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return dict(registers=number(r"Used (\d+) registers"), spills=spills, shared=number(r"(\d+) bytes smem"))


def read(op: str, name: str, arch: str = "sm_90") -> Sass:
    """Compiles template instance `name` of operator `op`, unless the cache has it, and disassembles it."""
    cubin = compile_cuda.cubin(op, name, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.code)
        file.flush()
        text = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return Sass(parse(text), **resources(cubin.report))


def parse(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing; a jump's target is the address of its label."""
    labels, lines, waiting = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            waiting.append(label[1])
        elif match := _LINE.search(line):
            address = int(match[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            lines.append((address, match[3], match[4].strip()))
    out = []
    for address, name, operands in lines:
        jump = re.search(r"\((\.L_\w+)\)", operands) if name.split(".")[0] == "BRA" else None
        out.append(Instruction(address, name, operands, labels.get(jump[1]) if jump else None))
    return out


def resident_warps(registers: int, shared: int, threads: int) -> int:
    """Warps that a multiprocessor of an H100 holds: 65536 registers, 227 KiB of shared memory, 64 warps, 32 blocks."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // warps
    by_shared = 227 * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps


F, H = torch.float32, torch.bfloat16


class Kernel(NamedTuple):
    """A template instance to report on."""

    op: str
    name: str
    elements: int  # steps of a channel per thread and iteration of the hot loop
    threads: int = 128  # per block
    trips: tuple[float, ...] = ()  # of the inner loops of the hot loop


def one_state(kernel: str, dtype: torch.dtype, rank: int, lanes: int, ends: bool = False) -> Kernel:
    """A kernel of the selective scan for one state."""
    slices = compile_cuda.MAX_THREADS // lanes
    rows = (rank + 1) / slices  # of the gradient of the weights, for each slice
    trips = ()
    if kernel == "backward" and not ends:
        trips = (lanes / 2, rows, slices) if rank >= slices else (lanes / 2, rows * slices)
        trips = (rank / 2, *trips) if rank > 24 else trips  # weights that do not fit in shared memory
    name = template(f"{kernel}_one", dtype, F, rank, 4, lanes, True, ends)
    return Kernel("selective_scan", name, 16, trips=trips)


def sixteen_states(kernel: str, ends: bool = False, powers: bool = False) -> Kernel:
    """A kernel of the selective scan for 16 states of rank 12; with `powers`, where A_n = n A_1."""
    if kernel == "backward":
        return Kernel("selective_scan", template("backward", F, F, 16, 12, True), 16, trips=(2, 2, 1.5, 3, 16, 3, 5.5))
    steps = (4, 0) if powers else (0, 4)  # four at once: by powers, by exponentials
    trips = (2, *(() if ends else (2,)), 1.5, *steps)
    return Kernel("selective_scan", template("forward", F, F, 16, 12, True, ends), 16, trips=trips)


KERNELS = (
    *(one_state(k, dtype, rank, lanes) for k in ("forward", "backward") for dtype, rank, lanes in
      ((F, 6, 8), (H, 6, 8), (H, 12, 16), (H, 24, 32), (H, 48, 32))),
    *(one_state(k, F, 6, 8, True) for k in ("forward", "backward")),
    *(sixteen_states("forward", ends, powers) for ends in (False, True) for powers in (False, True)),
    sixteen_states("backward"),
    ENDS_BACKWARD := Kernel("selective_scan", template("adjoint_ends", F, F, 16, 12, True), 16),
    Kernel("wkv", template("bi_sweep", F, False), 16),
    Kernel("wkv", template("bi_sweep", F, True), 16),
    Kernel("wkv", template("forward6", 64), 16),
    Kernel("wkv", template("backward6", 64), 16),
    Kernel("wkv", template("forward7", 64), 16),
    Kernel("wkv", template("backward7", 64), 16),
    Kernel("wkv", template("forward", F, 64, False), 1, 64),
    Kernel("wkv", template("forward", F, 64, True), 1, 64),
    Kernel("wkv", template("backward", F, 64, False), 1, 64),
    Kernel("wkv", template("backward", F, 64, True), 1, 64),
    *(Kernel("mlstm", template("carry", b, 4), 32, 96) for b in (False, True)),  # steps of 48 x 48 of a state
    Kernel("rational", template("forward", F, F, 4), 16),
    Kernel("rational", template("forward", H, F, 4), 16),
    Kernel("rational", template("backward", F, F, 4), 16),
    Kernel("rational", template("backward", H, F, 4), 16),
    Kernel("causal_conv1d", template("forward", F, F, 4, True), 8),
    Kernel("causal_conv1d", template("backward", F, F, 4, True), 8),
    Kernel("diagonal_scan", template("scan", F, F, F, True, False), 8),
    Kernel("deform_conv", template("forward", F, F, 3, 4), 36),  # taps of channels: all nine, without a loop
    Kernel("deform_conv", template("backward", F, F, 3, 4, 4), 4),
)  # fmt: skip
COLUMNS = ("kernel", "instr", "mufu", "lds", "shfl", "mma", "load", "store", "regs", "spills", "shared", "warps")


def row(kernel: Kernel, arch: str = "sm_90") -> dict:
    """The columns of a kernel."""
    sass = read(kernel.op, kernel.name, arch)
    executed = sass.executed(kernel.trips)

    def each(*names):
        return round(sum(n for i, n in executed if not names or _is(i, *names)) / kernel.elements, 1)

    def width(*names):
        all_of = widths([i for i, _ in executed], *names)
        return f"{min(all_of)}-{max(all_of)}" if len(set(all_of)) > 1 else str(all_of[0]) if all_of else "-"

    out = dict(kernel=f"{kernel.op} {kernel.name}", instr=each(), mufu=each("MUFU"), lds=each("LDS"), shfl=each("SHFL"))
    out |= dict(
        mma=each("HMMA"),
        load=width("LDG"),
        store=width(*STORES),
        regs=sass.registers,
        spills=sass.spills,
        shared=sass.shared,
    )
    return out | dict(warps=resident_warps(sass.registers, sass.shared, kernel.threads))


# An H100: multiprocessors, clock, bytes per second of a copy, bytes of L2 cache that a kernel may count on. Each of
# four schedulers starts one instruction per cycle, and a special function every 8. A 16-byte access to shared memory
# takes 2 cycles of the multiprocessor.
SMS, CLOCK, BANDWIDTH, CACHE = 132, 1.7e9, 2.95e12, 40e6
ROUND_TRIP, BARRIER = 700, 40  # cycles a warp waits for global memory (twice per iteration), and at a barrier
BOUNDS = ("issue", "mufu", "shared", "latency")


class Scan(NamedTuple):
    """A shape of the selective scan: groups share u, and their outputs and the gradients of u are merged."""

    batch: int
    steps: int
    groups: int
    channels: int
    states: int
    rank: int
    dtype: torch.dtype


SHAPES = (
    Scan(64, 3136, 4, 96, 1, 6, F),
    *(Scan(128, steps, 4, channels, 1, rank, H)
      for steps, channels, rank in ((3136, 96, 6), (784, 192, 12), (196, 384, 24), (49, 768, 48))),
    Scan(8, 3136, 4, 192, 16, 12, F),
)  # fmt: skip


def predict(x: Scan, kernel: str, powers: bool = False) -> dict:
    """Milliseconds of "forward" or "backward" on an H100, by bound; `low` and `high` are the prediction.

    They are the largest bound at 80 % of the hardware's peak: `low` if the cache keeps what groups share, `high` if
    each group must fetch and merge for itself. With `powers`, of sixteen states with A_n = n A_1.
    """
    one = x.states == 1
    width = 4 * cuda.lanes(x.channels)
    per_item, threads = (-(-x.channels // width), 128) if one else compile_cuda.channel_blocks(x.channels)
    blocks = x.batch * x.groups * per_item
    chunk = cuda.chunk(x.channels, x.states)
    segments, _ = compile_cuda.segments(x.steps, 4 * blocks * threads, torch.device("cpu"), 256, chunk)
    if one:
        passes = [one_state(kernel, x.dtype, x.rank, width // 4, ends) for ends in (False, True)]
    else:
        ends = sixteen_states("forward", True, powers) if kernel == "forward" else ENDS_BACKWARD
        passes = [k._replace(threads=threads) for k in (sixteen_states(kernel, powers=powers), ends)]
    ms = dict.fromkeys(BOUNDS, 0.0)
    for k in passes[: 1 + (segments > 1)]:
        ms = {name: ms[name] + n for name, n in _pass(k, x, blocks * segments).items()}
    size, tokens = x.dtype.itemsize, x.batch * x.steps
    u, merged = tokens * x.channels * size, tokens * x.channels * 4
    rows = tokens * x.groups * (x.rank + 2 * x.states)
    if kernel == "forward":
        once, each = u + merged + rows * size, x.groups * (u + 2 * merged) + rows * size
    else:  # the gradients of rows are written by every block of channels
        rows *= size + 4 * per_item
        once, each = 2 * u + merged + rows, 2 * x.groups * (u + merged) + rows
    ms |= dict(hbm=1e3 * once / BANDWIDTH, hbm_each=1e3 * (once if u + merged < CACHE else each) / BANDWIDTH)
    inner = max(ms[name] for name in BOUNDS)
    return ms | dict(low=max(inner, ms["hbm"]) / 0.8, high=max(inner, ms["hbm_each"]) / 0.8)


def _pass(kernel: Kernel, x: Scan, blocks: int) -> dict:
    sass = read(kernel.op, kernel.name)
    executed = sass.executed(kernel.trips)
    chunk = cuda.chunk(x.channels, x.states)
    steps = -(-x.steps // chunk) * chunk  # padding steps are computed, too
    iterations = x.batch * steps * x.groups * x.channels / (kernel.elements * 32)  # of all warps
    warps = resident_warps(sass.registers, sass.shared, kernel.threads)
    slots = SMS * warps // (kernel.threads // 32)
    tail = -(-blocks // slots) * slots / blocks if blocks > slots else 1
    schedulers = 4 * min(SMS, blocks)

    def cycles(cost):
        return sum(n * cost(i) for i, n in executed)

    waits = 2 * ROUND_TRIP + BARRIER * cycles(lambda i: _is(i, "BAR")) + 2 * cycles(lambda i: 1)
    out = dict(
        issue=cycles(lambda i: 1) / schedulers,
        mufu=cycles(lambda i: 8 * _is(i, "MUFU")) / schedulers,
        shared=cycles(lambda i: 4 * max(i.bytes // 8, 1) * _is(i, "LDS", "STS")) / schedulers,
        latency=waits / min(SMS * warps, blocks * kernel.threads // 32),
    )
    return {name: 1e3 * n * iterations * tail / CLOCK for name, n in out.items()}


def shared_gradient(x: Scan) -> dict:
    """What du costs beside the backward pass: MB of memory and ms of HBM on an H100.

    `groups`: each group writes its own, and a sum reads them. `merged`: zeros are added to, in float32 (`low`: in the
    cache; `high`: in HBM), and become the dtype of u.
    """
    u = x.batch * x.steps * x.channels * x.dtype.itemsize
    sums, cast = u * 4 // x.dtype.itemsize, u if x.dtype != F else 0
    bytes_ = dict(
        groups=(2 * x.groups + 1) * u, merged_low=2 * sums + cast, merged_high=(2 * x.groups + 2) * sums + cast
    )
    mb = dict(groups_mb=(x.groups + 1) * u / 1e6, merged_mb=(sums + cast) / 1e6)
    return mb | {f"{name}_ms": 1e3 * n / BANDWIDTH for name, n in bytes_.items()}


# A product of 16 x 8 by 8 x 8 in tf32 takes a multiprocessor a cycle, and `mma.sync` reaches 62 % of that.
PRODUCT = 1 / 0.62


class Heads(NamedTuple):
    """A shape of `wkv6` in both directions, or of `wkv7` along one order, with heads of 64 channels."""

    batch: int
    steps: int
    heads: int


HEADS = (Heads(32, 1024, 12), Heads(128, 196, 3), Heads(8, 3136, 12))


# By version and kernel: rows that a step reads or writes, and how often a chunk waits for global memory.
ROWS = {6: dict(forward=5, backward=9), 7: dict(forward=7, backward=13)}
WAITS = {6: dict(forward=2, backward=2), 7: dict(forward=2, backward=5)}


def predict_heads(x: Heads, kernel: str, version: int = 6) -> dict:
    """Milliseconds of wkv6 or wkv7 on an H100, by bound, and `low`, the largest at 80 % of the peak.

    Args:
        x: The shape.
        kernel: "forward", which stores the states, or "backward".
        version: 6 or 7.
    """
    found = next(k for k in KERNELS if k.name == template(f"{kernel}{version}", 64))
    sass = read(found.op, found.name)
    executed = sass.executed()
    heads, chunks = x.batch * x.heads * (2 if version == 6 else 1), -(-x.steps // 16)
    warps = resident_warps(sass.registers, sass.shared, found.threads)
    slots = SMS * warps // 4
    rounds = heads * chunks * (-(-heads // slots) * slots / heads if heads > slots else 1)  # of a block, with the tail
    busy = min(SMS, heads)

    def cycles(cost):
        return rounds * sum(n * cost(i) for i, n in executed)

    round_trips = WAITS[version][kernel] * ROUND_TRIP * heads * chunks
    waits = round_trips + BARRIER * cycles(lambda i: _is(i, "BAR")) + 2 * cycles(lambda i: 1)
    ms = dict(
        issue=cycles(lambda i: 1) / busy,  # four warps for four schedulers
        tensor=cycles(lambda i: 4 * PRODUCT * _is(i, "HMMA")) / busy,
        shared=cycles(lambda i: 4 * max(i.bytes // 4, 1) * _is(i, "LDS", "STS")) / busy,
        latency=waits / min(slots, heads),
    )
    ms = {name: 1e3 * n / CLOCK for name, n in ms.items()}
    ms["hbm"] = 1e3 * 4 * heads * (64 * ROWS[version][kernel] * x.steps + chunks * 64 * 64) / BANDWIDTH
    return ms | dict(low=max(ms.values()) / 0.8)


class Memory(NamedTuple):
    """A shape of `mlstm`."""

    batch: int
    steps: int
    heads: int
    channels: int


MEMORIES = (Memory(8, 3136, 4, 96), *(Memory(128, 196, 4, channels) for channels in (96, 192, 384)))


def _passes(x: Memory, kernel: str) -> list[tuple]:
    """Kernels of `mlstm`: name, blocks, threads, iterations of the loop that writes, rows and states moved."""
    heads, chunks, tiles = x.batch * x.heads, -(-x.steps // 64), -(-x.channels // 48)
    gates, all_ = -(-x.steps // 256), heads * chunks
    states = [(template("carry", b, 4), heads * tiles**2, 96, 2 * chunks, 2, 1) for b in (False, True)]
    apply = [(template("apply", out, 4), all_ * tiles, 128, 1, 4 if out in (0, 3) else 5, 1) for out in range(4)]
    forward = [(mlstm_cuda.MAXIMUM, heads, 32, gates, 0, 0), states[0]]
    if kernel == "forward":
        return [*forward, apply[0]]
    first = (mlstm_cuda.THROUGH_H, heads * x.steps // 4, 128, 1, 2, 0)
    last = (template("gates", 4), all_, 128, 1, 4, 2), (mlstm_cuda.MAXIMUM_BACKWARD, heads, 32, gates, 0, 0)
    return [first, *forward, states[1], *apply[1:], *last]


def _executed(sass: Sass, x: Memory, iterations: int) -> list[tuple[Instruction, float]]:
    """The instructions of a warp, each with how often it runs: loops with products go through the channels."""
    times = dict.fromkeys((i.address for i in sass.code), 1.0)
    loops = sass.loops()
    wide = max((widths(body, "LDG").count(16) for body in loops if not count(body, "HMMA")), default=0)
    for body in loops:
        trips = 1.0
        if count(body, *STORES):
            trips = iterations
        elif count(body, "HMMA"):
            trips = -(-x.channels // 16)
        elif wide and widths(body, "LDG").count(16) == wide:  # the states with their adjoints
            trips = 2 * (x.channels + 1) * x.channels / 512 / wide
        elif count(body, "LDS") and not count(body, "LDG", *STORES):  # the pairs of a chunk, four steps at a time
            trips = 16
        for i in body:
            times[i.address] *= trips
    return [(i, times[i.address]) for i in sass.code]


def predict_memory(x: Memory, kernel: str) -> dict:
    """Milliseconds of `mlstm` on an H100 by bound, of all its kernels; `low` sums the largest of each, at 80 %.

    `chunked_gb`: what PyTorch's matrix products in its place move, and `chunked` the milliseconds of that.
    """
    names, low = ("issue", "tensor", "shared", "latency", "hbm"), 0.0
    ms: dict[str, float] = dict.fromkeys(names, 0.0)
    row, state = (4 * x.batch * x.heads * x.channels * n for n in (x.steps, -(-x.steps // 64) * (x.channels + 1)))
    for name, blocks, threads, iterations, rows, states in _passes(x, kernel):
        sass = read("mlstm", name)
        executed = _executed(sass, x, iterations)
        slots = SMS * resident_warps(sass.registers, sass.shared, threads) * 32 // threads
        rounds = -(-blocks // slots) * slots if blocks > slots else blocks  # of a block, with the tail
        warps, busy = threads // 32, min(SMS, blocks)

        def cycles(cost, executed=executed, rounds=rounds, warps=warps, busy=busy):
            return rounds * warps * sum(n * cost(i) for i, n in executed) / busy

        deepest = max((n for i, n in executed if _is(i, "LDG")), default=0)
        waits = ROUND_TRIP * (1 + deepest) + sum(n * (2 + BARRIER * _is(i, "BAR")) for i, n in executed)
        bounds = dict(
            issue=cycles(lambda i: 1) / min(4, warps * max(slots // SMS, 1)),
            tensor=cycles(lambda i: PRODUCT * _is(i, "HMMA")),
            shared=cycles(lambda i: max(i.bytes // 4, 1) * _is(i, "LDS", "STS")),
            latency=rounds * waits / min(slots, blocks),
        )
        bounds = {key: 1e3 * n / CLOCK for key, n in bounds.items()}
        bounds["hbm"] = 1e3 * (rows * row + states * state) / BANDWIDTH
        ms = {key: ms[key] + n for key, n in bounds.items()}
        low += max(bounds.values()) / 0.8
    q, k, v = (torch.empty(*x, device="meta", requires_grad=kernel == "backward") for _ in range(3))
    i, f = (torch.empty(*x[:3], device="meta", requires_grad=kernel == "backward") for _ in range(2))
    with Traffic() as moved:
        h = mlstm_reference.chunked(q, k, v, i, f, 1e-6, 64)
        if kernel == "backward":  # the operator runs the products again for it
            torch.autograd.grad(h, (q, k, v, i, f), torch.empty_like(h))
    return ms | dict(low=low, chunked_gb=moved.bytes / 1e9, chunked=1e3 * moved.bytes / BANDWIDTH)


class Traffic(TorchDispatchMode):
    """Counts what PyTorch's kernels read and write, each element once per operation; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = not func._schema.is_mutable and any(r.alias_info for r in func._schema.returns)
        if not view and "view" not in func.name() and "empty" not in func.name():
            self.bytes += _bytes(*tree_leaves((args, kwargs)), *tree_leaves(out))
        return out


def _bytes(*tensors) -> int:
    """Of all elements, those of an expand once."""
    strided = [(t, zip(t.shape, t.stride(), strict=True)) for t in tensors if isinstance(t, torch.Tensor)]
    return sum(t.element_size() * math.prod(n for n, stride in axes if stride) for t, axes in strided)


CORES, TENSOR_CORES = 60e12, 400e12  # float32 and tf32 products on an H100: nine and eight tenths of the peak


class Duality(NamedTuple):
    """A shape of `nc_ssd`, or of `ssd` if causal, with heads of 64 channels."""

    batch: int
    steps: int
    heads: int
    states: int
    dtype: torch.dtype
    causal: bool = False


DUALITIES = (
    *(Duality(128, steps, heads, 64, dtype) for dtype in (F, H) for steps, heads in ((3136, 2), (784, 4), (196, 8))),
    *(Duality(32, 256, 32, 64, dtype, causal=True) for dtype in (F, H)),
)  # VSSD-T, M-VAR


def predict_duality(x: Duality, backward: bool) -> dict:
    """GB that PyTorch moves, and a kernel that reads its inputs and writes its results once; milliseconds."""
    shape, narrow = (x.batch, x.steps, x.heads), (x.batch, x.steps, x.states)
    u = torch.empty(*shape, 64, device="meta", dtype=x.dtype)
    B, C = (torch.empty(narrow, device="meta", dtype=x.dtype) for _ in range(2))
    dt, A, D = (torch.empty(s, device="meta") for s in (shape, (x.heads,), (x.heads,)))
    leaves = [t.requires_grad_(backward) for t in (u, dt, B, C, D)]
    with Traffic() as moved, FlopCounterMode(display=False) as flops:
        y = ssd(u, dt, A, B.unsqueeze(2), C.unsqueeze(2), D) if x.causal else nc_ssd(u, dt, B, C, D)
        if backward:
            torch.autograd.grad(y, leaves, torch.empty_like(y))
    least = _bytes(*leaves, y) + backward * _bytes(*leaves, *leaves, y)
    operations = flops.get_total_flops()
    return dict(
        gb=moved.bytes / 1e9,
        least_gb=least / 1e9,
        hbm=1e3 * moved.bytes / BANDWIDTH,
        cores=1e3 * operations / CORES,
        tensor=1e3 * operations / TENSOR_CORES,
        least=1e3 * max(least / BANDWIDTH, operations / TENSOR_CORES),
    )


def block_gb(x: Duality, backward: bool) -> float:
    """GB that PyTorch's operations move in the whole block of VSSD-T that has the shape `x` of `nc_ssd`."""
    from linzoo.backbones.vssd import vssd_t

    side = math.isqrt(x.steps)
    block = vssd_t(device="meta", dtype=x.dtype).stages[int(math.log2(x.heads)) - 1].blocks[0]
    u = torch.empty(x.batch, side, side, 32 * x.heads, device="meta", dtype=x.dtype, requires_grad=backward)
    with Traffic() as moved, torch.set_grad_enabled(backward):
        y = block(u)
        if backward:
            torch.autograd.grad(y, [u, *block.parameters()], torch.empty_like(y))
    return moved.bytes / 1e9


MODEL = """# What the kernels should take on an H100

Predicted by `python tools/sass.py --model` from the machine code that NVRTC makes for sm_90. **Nothing here is
measured**: the kernels have not run on a GPU yet, and their first run tests these tables.

## The selective scan

Milliseconds, by bound: instructions issued, special functions, shared memory, latency of what a warp waits for, and
HBM: `hbm` if the cache keeps what the four groups share, `hbm each` if every group fetches and merges for itself. `low`
and `high` are the largest bound in either case at 80 % of what the hardware promises. The forward pass merges the
groups' outputs, the backward pass the gradients of the map that they share.
`(powers)`: where A_n = n A_1, as in Mamba before it is trained. (A polynomial in place of a special function takes nine
instructions more and saves eight cycles: no gain, as `issue` is no less than `mufu`.)

| pass | B | L | G | D | N | R | dtype | issue | mufu | shared | latency | hbm | hbm each | low | high |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


MODEL_SHARED = """
## The gradient of a map that groups share

Memory in MB and milliseconds of HBM. `groups`: each group writes its own du, and a sum of its own pass reads them.
`merged`: each adds to one in float32, beside the backward pass's arithmetic; then it becomes the dtype of the map.
`low` if the cache keeps what is added to, `high` if not.

| B | L | G | D | dtype | groups MB | merged MB | groups ms | merged low ms | merged high ms |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


MODEL_HEADS = """
## wkv6

In both directions, float32, heads of 64 channels; the forward pass stores the states for the backward pass. `tensor` is
the time of the products on tensor cores at 62 % of their peak, what `mma.sync` reaches. `hbm`: each direction reads and
writes for itself.

| pass | B | L | H | issue | tensor | shared | latency | hbm | low |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


MODEL_HEADS7 = """
## wkv7

The same, along one order.

| pass | B | L | H | issue | tensor | shared | latency | hbm | low |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


MODEL_MEMORY = """
## mlstm

Float32, ViL's heads; milliseconds summed over the kernels of a pass, `low` the sum of each one's largest bound. `hbm`:
each kernel reads and writes for itself, blocks of one kernel share the cache. `chunked GB` is what PyTorch's matrix
products move, which served before, operation by operation, and `chunked` the milliseconds of HBM of that; backward they
run again.

| pass | B | L | H | P | issue | tensor | shared | latency | hbm | low | chunked GB | chunked |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


MODEL_DUALITY = """
## ssd and nc_ssd

They have no kernel: PyTorch's products, and operations between them. GB that these move, counted operation by
operation, and milliseconds of HBM (`hbm`) and of the products in float32, as PyTorch computes by default (`cores`), and
in tf32 (`tensor`). `least`: a kernel that reads each input and writes each result once, with products in tf32. `block
GB`: what the whole block of VSSD-T moves. The shapes of `ssd` are those of M-VAR's last map (d16).

The products are not the bound: `cores` is below `hbm`. What lies around them is: casts, weights and sums, each a pass.

| operator | pass | B | L | H | N | dtype | GB | least GB | hbm | cores | tensor | least | block GB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def _rows_of_dualities() -> list[tuple]:
    rows = []
    for x in DUALITIES:
        for backward in (False, True):
            kind, figures = (
                ("ssd" if x.causal else "nc_ssd", "both" if backward else "forward"),
                predict_duality(x, backward),
            )
            block = "" if x.causal else f"{block_gb(x, backward):.3f}"
            rows.append((*kind, *x[:4], _name(x.dtype), *_milli(figures), block))
    return rows


def model() -> str:
    """The performance model's tables, as Markdown."""
    tables = (
        (MODEL, _rows_of_scans()),
        (MODEL_SHARED, _rows_of_shared()),
        (MODEL_HEADS, _rows_of_heads(6)),
        (MODEL_HEADS7, _rows_of_heads(7)),
        (MODEL_MEMORY, [(k, *x, *_milli(predict_memory(x, k))) for x in MEMORIES for k in PASSES]),
        (MODEL_DUALITY, _rows_of_dualities()),
    )
    return "".join(head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows) for head, rows in tables)


PASSES = ("forward", "backward")


def _milli(figures: dict) -> list[str]:
    return [f"{n:.3f}" for n in figures.values()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows_of_shared() -> list[tuple]:
    figures = [(x, shared_gradient(x).items()) for x in SHAPES]
    return [(*x[:4], _name(x.dtype), *(f"{n:.{0 if 'mb' in k else 3}f}" for k, n in found)) for x, found in figures]


def _rows_of_heads(version: int) -> list[tuple]:
    return [(kernel, *x, *_milli(predict_heads(x, kernel, version))) for x in HEADS for kernel in PASSES]


def _rows_of_scans() -> list[tuple]:
    rows = []
    for x in SHAPES:
        kernels = ("forward", *(("forward (powers)",) if x.states > 1 else ()), "backward")
        for kernel in kernels:
            ms = predict(x, kernel.split()[0], "powers" in kernel)
            rows.append((kernel, *x[:-1], _name(x.dtype), *_milli(ms)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="architecture to compile for (%(default)s)")
    parser.add_argument("--op", help="only this operator")
    parser.add_argument("--dump", metavar="NAME", help="print the hot loop of this template instance of --op")
    parser.add_argument("--model", action="store_true", help="print the performance model as Markdown")
    args = parser.parse_args(argv)
    if args.dump and not args.op:
        parser.error("--dump needs --op")
    try:
        disassembler()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.dump:
        for i in read(args.op, args.dump, args.arch).loop():
            print(f"{i.address:5x}  {i.name} {i.operands}")
        return 0
    if args.model:
        print(model(), end="")
        return 0
    table = Table(*COLUMNS, box=None)
    for kernel in KERNELS:
        if args.op in (None, kernel.op):
            table.add_row(*(str(x) for x in row(kernel, args.arch).values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
