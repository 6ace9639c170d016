"""What the CUDA kernels cost, read from their machine code: budgets of a step, of registers, of the widths of accesses.

The cubins are those of `test_cuda.py`, from the cache.
"""

import importlib.util
import shutil

import pytest
import torch

from linzoo.ops import compile_cuda
from linzoo.ops.compile_cuda import template
from linzoo.ops.selective_scan import cuda
from linzoo.tools import sass

COMPILER = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None
F, H = torch.float32, torch.bfloat16


def _disassembles():
    try:
        return bool(sass.disassembler())
    except FileNotFoundError:
        return False


needs_tools = pytest.mark.skipif(not (COMPILER and _disassembles()), reason=f"needs NVRTC and nvdisasm: {sass.REMEDY}")

LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!P0 MUFU.EX2 R5, R5 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0050*/                   BRA `(.L_x_0) ;
        /*0060*/                   STS [R2], R4 ;
        /*0070*/                   EXIT ;
"""


def test_a_listing_is_read():
    code = sass.parse(LISTING)
    assert [i.name.split(".")[0] for i in code] == ["LDC", "LDG", "MUFU", "BRA", "STG", "BRA", "STS", "EXIT"]
    assert code[3].target == 0x20 and code[5].target == 0x10
    kernel = sass.Sass(code, registers=32, spills=0, shared=0)
    assert [len(body) for body in kernel.loops()] == [5, 2] and len(kernel.loop()) == 5
    assert [n for _, n in kernel.executed((3,))] == [1, 3, 3, 1, 1]
    assert sass.widths(code, "LDG") == [16] and sass.widths(code, "STG") == [2] and sass.count(code, "MUFU") == 1
    with pytest.raises(ValueError, match="expected one for each of 1 loops"):
        kernel.executed((3, 4))


def test_resident_warps_of_an_h100():
    assert sass.resident_warps(80, 7552, 128) == 24 and sass.resident_warps(128, 0, 128) == 16
    assert sass.resident_warps(32, 0, 128) == 64 and sass.resident_warps(32, 100 * 1024, 128) == 8


def test_without_a_disassembler_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sass.sys, "path", [])
    assert sass.main([]) == 2
    assert "nvdisasm is not installed: install the CUDA toolkit" in capsys.readouterr().err


def check(kernel, instructions, registers, spills, warps):
    figures = sass.row(kernel)
    limits = dict(instr=instructions, regs=registers, spills=spills)
    exceeded = {name: (figures[name], limit) for name, limit in limits.items() if figures[name] > limit}
    assert not exceeded and figures["warps"] >= warps, figures


# Rank and lanes; instructions of a step forward and backward.
ONE_STATE = ((F, 6, 8, 50, 122), (H, 6, 8, 53, 126), (H, 12, 16, 58, 152), (H, 24, 32, 69, 214), (H, 48, 32, 98, 450))


@needs_tools
@pytest.mark.parametrize(("dtype", "rank", "lanes", "forward", "backward"), ONE_STATE, ids=str)
def test_budget_of_the_scan_with_one_state(dtype, rank, lanes, forward, backward):
    check(sass.one_state("forward", dtype, rank, lanes), forward, 80, 0, 24)
    check(sass.one_state("backward", dtype, rank, lanes), backward, 128, 192, 16)


@needs_tools
@pytest.mark.parametrize(("dtype", "wide"), ((F, 16), (H, 8)), ids=str)
def test_activations_are_read_and_written_four_at_a_time(dtype, wide):
    """In one access for each of four steps; also the alternative that merges groups, in float32."""
    loop = sass.read("selective_scan", sass.one_state("forward", dtype, 6, 8).name).loop()
    assert sass.widths(loop, "LDG").count(wide) >= 4 and sass.widths(loop, "STG").count(wide) == 4
    assert sass.widths(loop, "RED", "REDG") == [16] * 4
    first_barrier = next(i.address for i in loop if i.name.startswith("BAR"))
    assert sum(i.address < first_barrier for i in loop if i.name.startswith("LDG")) >= 9  # all of them at once
    loop = sass.read("selective_scan", sass.one_state("backward", dtype, 6, 8).name).loop()
    assert sass.widths(loop, "LDG").count(wide) >= 8 and sass.widths(loop, "STG").count(wide) == 4
    assert sass.widths(loop, "RED", "REDG") == [16] * 4


@needs_tools
def test_budget_of_the_scan_with_sixteen_states():
    for ends, instructions, with_powers in ((False, 158, 143), (True, 114, 99)):
        kernel = sass.sixteen_states("forward", ends)
        check(kernel, instructions, 96, 32, 20)
        powers = sass.sixteen_states("forward", ends, powers=True)
        check(powers, with_powers, 96, 32, 20)
        assert sass.row(kernel)["mufu"] == 17 and sass.row(powers)["mufu"] == 2
    check(sass.sixteen_states("backward"), 655, 168, 0, 12)


# Operator, instance, instructions of an element, bytes of every access of activations.
OTHERS = (
    ("rational", template("forward", F, F, 4), 23, 16),
    ("rational", template("forward", H, F, 4), 25, 8),
    ("rational", template("backward", F, F, 4), 56, 16),
    ("diagonal_scan", template("scan", F, F, F, True, False), 29, 8),
    ("causal_conv1d", template("forward", F, F, 4, True), 51, 4),
    ("deform_conv", template("forward", F, F, 3, 4), 40, 16),
    ("wkv", template("bi_sweep", F, False), 190, 4),
    ("wkv", template("bi_sweep", F, True), 260, 4),
)


@needs_tools
@pytest.mark.parametrize(("op", "name", "instructions", "wide"), OTHERS, ids=str)
def test_budget_of_other_kernels(op, name, instructions, wide):
    kernel = next(k for k in sass.KERNELS if (k.op, k.name) == (op, name))
    check(kernel, instructions, 216, 0, 8)
    assert set(sass.widths(sass.read(op, name).loop(), *sass.STORES)) == {wide}


# Kernel, registers, bytes spilled; of a warp, products on tensor cores in 16 steps for heads of 16, 32 and 64 channels.
HEADS = (
    ("forward6", 128, 0, (40, 68, 124)),
    ("backward6", 168, 0, (84, 144, 264)),
    ("forward7", 168, 0, (148, 196, 292)),
    ("backward7", 168, 96, (396, 504, 720)),
)


@needs_tools
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize(("name", "registers", "spills", "products"), HEADS, ids=str)
def test_wkv_on_tensor_cores(name, registers, spills, products, arch):
    for channels, expected in zip((16, 32, 64), products, strict=True):
        kernel = sass.read("wkv", template(name, channels), arch)
        assert sass.count(kernel.loop(), "HMMA") == expected
        assert kernel.spills <= spills and kernel.registers <= registers and kernel.shared <= 48 * 1024


@needs_tools
def test_budget_of_wkv():
    """Of a step, by each of the four warps of a head of 64 channels."""
    kernels = {k.name: k for k in sass.KERNELS if k.op == "wkv"}
    for name, instructions, registers, spills, loads, warps in (
        ("forward6", 92, 128, 0, 4.5, 16),
        ("backward6", 200, 168, 0, 18, 12),
        ("forward7", 161, 168, 0, 11.5, 12),
        ("backward7", 455, 168, 48, 38, 12),
    ):
        kernel = kernels[template(name, 64)]
        check(kernel, instructions, registers, spills, warps)
        assert sass.row(kernel)["lds"] <= loads


# Kernel, instructions of a warp in its hot loop, products on tensor cores in it and around it.
MEMORY = (
    (template("carry", False, 4), 860, 72, 0),
    (template("carry", True, 4), 860, 72, 0),
    *((template("apply", out, 4), 660, 84, 144) for out in range(4)),
    (template("gates", 4), 410, 48, 48),
)


@needs_tools
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
@pytest.mark.parametrize(("name", "instructions", "products", "around"), MEMORY, ids=str)
def test_budget_of_mlstm(name, instructions, products, around, arch):
    kernel = sass.read("mlstm", name, arch)
    loop = max(kernel.loops(), key=lambda body: (sass.count(body, "HMMA"), len(body)))
    assert sass.count(loop, "HMMA") == products and sass.count(kernel.code, "HMMA") == products + around
    assert len(loop) <= instructions and kernel.spills <= 64
    threads, warps = (96, 15) if name.startswith("carry") else (128, 12)
    assert sass.resident_warps(kernel.registers, kernel.shared, threads) >= warps


@needs_tools
def test_the_model_says_what_mlstm_saves():
    for shape in sass.MEMORIES:
        for kernel in ("forward", "backward"):
            found = sass.predict_memory(shape, kernel)
            assert found["low"] < found["chunked"] / 2


@needs_tools
def test_the_model_predicts_what_the_kernels_aim_at():
    """The larger of its bounds, at 80 % of the hardware; HBM if the cache keeps what groups share."""
    shape = sass.SHAPES[0]
    assert sass.predict(shape, "forward")["low"] <= 0.2
    assert sass.predict(shape, "backward")["low"] <= 0.65
    sixteen = sass.predict(sass.SHAPES[-1], "forward")
    shared = sass.shared_gradient(shape)
    assert shared["merged_mb"] <= shared["groups_mb"] / (shape.groups + 1)
    assert shared["merged_low_ms"] <= shared["groups_ms"] / 4 and shared["merged_high_ms"] <= 1.2 * shared["groups_ms"]
    assert sixteen["issue"] <= 1.5 * sixteen["mufu"]


def test_traffic_of_dualities():
    """`nc_ssd` in float32: the weighted x; two products of it, one by B, one by C; and y with the skip."""
    B, L, H, N = x = 2, 64, 3, 16
    wide, narrow, state = B * L * H * 64, B * L * N, B * N * H * 64
    moved = 2 * wide + B * L * H + (wide + narrow + state) + (state + narrow + wide) + 3 * wide + H
    found = sass.predict_duality(sass.Duality(*x, F), backward=False)
    assert found["gb"] == pytest.approx(4e-9 * moved) and found["least_gb"] < found["gb"] / 2.5
    assert found["cores"] == pytest.approx(1e3 * 4 * B * L * N * H * 64 / sass.CORES)
    causal = sass.predict_duality(sass.Duality(*x, F, causal=True), backward=True)
    assert causal["hbm"] > 10 * causal["least"]


@needs_tools
@pytest.mark.parametrize(
    ("channels", "states", "rank", "name"),
    (
        (96, 1, 6, sass.one_state("backward", F, 6, 8).name),
        (768, 1, 48, sass.one_state("backward", H, 48, 32).name),
        (192, 16, 12, template("backward", F, F, 16, 12, True)),
    ),
    ids=str,
)
def test_shared_memory_is_known_before_a_kernel_is_compiled(channels, states, rank, name):
    """What decides whether the kernels can take a scan at all."""
    used, bound = sass.read("selective_scan", name).shared, cuda.shared_memory(channels, states, rank, 4, 4)
    assert bound - 1024 <= used <= bound


def test_lanes_leave_few_threads_idle():
    assert [cuda.lanes(d) for d in (16, 32, 87, 96, 112, 192, 384, 768)] == [4, 8, 32, 8, 32, 16, 32, 32]
    for channels in range(1, 300):
        units = channels if channels % 4 else channels // 4
        n = cuda.lanes(channels)
        assert -(-units // n) * n < 2 * units + 4 and cuda.chunk(channels, 1) == compile_cuda.MAX_THREADS // n * 4
