#!/usr/bin/env python
"""Reads the machine code of the CUDA kernels, without a GPU: what NVRTC made of them, and what a step costs.

Each line is a template instance. The columns count the instructions of its hot loop, the largest loop that stores: each
once, whichever branch it stands on. `instr`, `mufu` (special functions), `lds` (shared memory) and `shfl` are per element:
a step of a channel. `load` and `store` are the narrowest and widest global accesses of the loop in bytes; `warps` are those that fit a
multiprocessor of an H100.
"""

import argparse
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

from linzoo.ops import compile_cuda
from linzoo.ops.compile_cuda import template

REMEDY = "install the CUDA toolkit, `pip install nvidia-cuda-nvdisasm`, or PyTorch's triton, which has it, too"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


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
        vector = {"v2": 8, "v4": 16}
        return next((n for key, n in (_BYTES | vector).items() if key in parts), 4)


class Sass(NamedTuple):
    """A kernel's machine code and resources; spills are bytes of stores and loads together."""

    code: list[Instruction]
    registers: int
    spills: int
    shared: int

    def loop(self) -> list[Instruction]:
        """The largest loop that writes to global memory, or all of the code if there is none."""
        bodies = [
            [i for i in self.code if j.target <= i.address <= j.address]
            for j in self.code
            if j.target is not None and j.target < j.address
        ]
        bodies = [b for b in bodies if any(_is(i, *STORES) for i in b)] or bodies or [self.code]
        return max(bodies, key=len)


STORES = ("STG", "RED", "ATOMG", "ATOM")


def _is(instruction: Instruction, *names: str) -> bool:
    return instruction.name.split(".")[0] in names


def count(code: list[Instruction], *names: str) -> int:
    """Instructions of these names; all for none."""
    return sum(_is(i, *names) for i in code) if names else len(code)


def widths(code: list[Instruction], *names: str) -> list[int]:
    """Bytes a thread, of every access of these names."""
    return [i.bytes for i in code if _is(i, *names)]


def disassembler() -> str:
    """Path of nvdisasm: on PATH, of the CUDA packages of PyPI, or of triton, which PyTorch for CUDA brings.

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
    """Registers, spills and shared memory of the compiler's report."""
    spills = sum(int(re.search(rf"(\d+) bytes spill {kind}", report)[1]) for kind in ("stores", "loads"))
    shared = re.search(r"(\d+) bytes smem", report)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return dict(registers=registers, spills=spills, shared=int(shared[1]) if shared else 0)


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
KERNELS = (  # operator, template instance, elements that a thread computes in an iteration of the hot loop, threads
    *(("selective_scan", template("forward", S, F, N, R, True, False), 16, 128)
      for S, N, R in ((F, 1, 6), (H, 1, 6), (H, 1, 24), (F, 16, 12))),
    ("selective_scan", template("forward", F, F, 1, 6, True, True), 16, 128),
    *(("selective_scan", template("backward", S, F, N, R, True), 16, 128)
      for S, N, R in ((F, 1, 6), (H, 1, 6), (H, 1, 24), (F, 16, 12))),
    ("wkv", template("bi_sweep", F, False), 16, 128),
    ("wkv", template("bi_sweep", F, True), 16, 128),
    ("wkv", template("forward", F, 64, False), 1, 64),
    ("wkv", template("forward", F, 64, True), 1, 64),
    ("wkv", template("backward", F, 64, False), 1, 64),
    ("wkv", template("backward", F, 64, True), 1, 64),
    ("rational", template("forward", F, F), 4, 128),
    ("rational", template("forward", H, F), 4, 128),
    ("rational", template("backward", F, F), 2, 128),
    ("causal_conv1d", template("forward", F, F, 4, True), 8, 128),
    ("causal_conv1d", template("backward", F, F, 4, True), 1, 128),
    ("diagonal_scan", template("scan", F, F, F, True, False), 8, 128),
    ("deform_conv", template("forward", F, F), 1, 128),
    ("deform_conv", template("backward", F, F), 1, 128),
)  # fmt: skip
COLUMNS = ("kernel", "instr", "mufu", "lds", "shfl", "load", "store", "regs", "spills", "shared", "warps")


def row(op: str, name: str, elements: int, threads: int, arch: str) -> dict:
    """The columns of a kernel."""
    sass = read(op, name, arch)
    loop = sass.loop()

    def each(*names):
        return round(count(loop, *names) / elements, 2)

    def width(*names):
        all_of = widths(loop, *names)
        return f"{min(all_of)}-{max(all_of)}" if len(set(all_of)) > 1 else str(all_of[0]) if all_of else "-"

    figures = dict(instr=each(), mufu=each("MUFU"), lds=each("LDS"), shfl=each("SHFL"))
    figures |= dict(load=width("LDG"), store=width(*STORES), regs=sass.registers, spills=sass.spills)
    return dict(kernel=f"{op} {name}") | figures | dict(
        shared=sass.shared, warps=resident_warps(sass.registers, sass.shared, threads)
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 if a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="architecture to compile for (%(default)s)")
    parser.add_argument("--op", help="of this operator alone")
    parser.add_argument("--dump", metavar="NAME", help="print the hot loop of this template instance of --op")
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
    table = Table(*COLUMNS, box=None)
    for kernel in KERNELS:
        if args.op in (None, kernel[0]):
            table.add_row(*(str(x) for x in row(*kernel, args.arch).values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
