"""The CUDA kernels: compiled for every architecture, run by an emulator, and (``-m gpu``) on a GPU.

Without a GPU NVRTC compiles what the operators dispatch, whose registers and spills must stay within a budget, and the
same sources run on the CPU, a block's threads as coroutines, for values and every gradient.
"""

import contextlib
import functools
import importlib.util
import math

import pytest
import torch

from linzoo.ops import (
    bi_wkv,
    causal_conv1d,
    compile_cuda,
    deform_conv,
    diagonal_scan,
    kernel_cache,
    mlstm,
    rational,
    scan_order,
    selective_scan,
    ssm_kernel,
    use_backend,
    wkv6,
    wkv7,
)
from linzoo.ops.compile_cuda import template
from linzoo.ops.selective_scan import cuda as selective_scan_cuda
from linzoo.ops.wkv import cuda as wkv_cuda
from linzoo.tools.sass import resources

COMPILER = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None
needs_compiler = pytest.mark.skipif(not COMPILER, reason="`pip install 'linzoo[cuda]'` brings NVRTC")

TYPES = ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.float32))
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def instances():
    """What the operators dispatch, as (operator, template instance).

    Numbers of states and ranks are template parameters, compiled as a model asks for them; those here are VMamba's,
    Vim's and a full-rank one.
    """
    out = []
    for types in TYPES:
        few = types[0] == torch.float64
        out += compile_cuda.scan_instances(types[0], ((6, 1 if few else 4, 8),), ((2, 6),) if few else ((16, 12),))
        if types[0] in (torch.float32, torch.bfloat16):
            shapes = ((0, 4, 8), (6, 1, 32), (12, 4, 16), (24, 4, 32), (48, 4, 32))
            out += compile_cuda.scan_instances(types[0], shapes, (), ends=(False,))
        for kernel in ("forward", "backward"):
            vector, lanes = 1 if few else 4, (4,) if kernel == "backward" else ()
            out.append(("rational", template(kernel, *types, vector)))
            out.append(("deform_conv", template(kernel, *types, 3, vector, *lanes)))
            out += [("causal_conv1d", template(kernel, *types, 4, silu)) for silu in (False, True)]
        for constant in (False, True):
            for written, ends in ((types[0], False), (types[1], False), (types[0], True)):
                out.append(("diagonal_scan", template("scan", types[0], written, types[1], constant, ends)))
    for dtype in (torch.float32, torch.float64):
        out += [("ssm_kernel", template(k, dtype)) for k in ("vandermonde", "vandermonde_backward")]
        out += [("ssm_kernel", template(k, dtype)) for k in ("cauchy", "cauchy_backward")]
        out += [("selective_scan", template("carry", dtype, reverse)) for reverse in (False, True)]
        out.append(("diagonal_scan", template("carry", dtype)))
        channels = 64 if dtype == torch.float32 else 32
        for flag in (False, True):
            out += [("wkv", template(kernel, dtype, flag)) for kernel in ("bi_ends", "bi_carry", "bi_sweep")]
            out += [("wkv", template(kernel, dtype, channels, flag)) for kernel in ("forward", "backward")]
    heads = ("forward6", "backward6", "forward7", "backward7")
    out += [("wkv", template(kernel, channels)) for kernel in heads for channels in (16, 32, 64)]
    out += compile_cuda.mlstm_instances(4) + compile_cuda.mlstm_instances(1)
    return sorted(set(out))


def budget(name):
    """Bytes that a template instance may spill, stores and loads together; `test_sass.py` is stricter with some."""
    if "double" in name:
        return 8192  # twice the registers; nobody trains in float64
    if name.startswith("backward_one"):
        return 256  # pointers, read again once a span: for another block on each multiprocessor
    if name.startswith("backward7"):
        return 160  # mostly addresses, read once a chunk
    if name.startswith("carry") and name.endswith(" 1>"):
        return 640  # mlstm, rows read one channel at a time
    return 256 if name.startswith("backward<float, 64") else 64  # 64 states and their adjoints


@needs_compiler
@pytest.mark.parametrize(
    ("op", "name"),
    (("selective_scan", "forward_one<bfloat16, float, 6, 4, 8, true, false>"), ("wkv", "bi_sweep<float, true>")),
)
def test_nvrtc_compiles(op, name):
    code, symbol, report = compile_cuda.compile_kernel(op, name, "sm_90")
    assert code[:4] == b"\x7fELF" and symbol
    assert resources(report)["spills"] <= budget(name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_every_kernel_within_its_budget(arch):
    """On sm_90 all of them; elsewhere those of float32 and bfloat16 that compile within a second or two."""
    few = arch != "sm_90"
    heavy = ("double", "<float16,", "16, 12", " 24, ", " 48, ")
    names = [(op, name) for op, name in instances() if not few or not any(part in name for part in heavy)]
    compile_cuda.precompile(names, arch)  # what the cache has not, in as many processes as there are cores
    failures = []
    for op, name in names:
        used = resources(compile_cuda.cubin(op, name, arch).report)
        if used["spills"] > budget(name):
            failures.append(f"{op} {name}: {used}")
    assert not failures, "\n".join(failures)


def test_old_gpus_do_not_take_bfloat16(monkeypatch):
    monkeypatch.setattr(compile_cuda, "_capability", lambda index: (7, 5))
    device, x = torch.device("cuda:0"), torch.zeros(1)
    assert compile_cuda.unsupported(device, x) is None
    assert "bfloat16 kernels need a GPU of compute capability 8.0 or more, got 7.5" in compile_cuda.unsupported(
        device, x, x.bfloat16()
    )


@pytest.mark.slow
def test_precompile_fills_the_cache(monkeypatch, tmp_path):
    """In processes of their own, as the command line does."""
    monkeypatch.setenv("LINZOO_CACHE", str(tmp_path))
    instances = [(op, name) for op, name in compile_cuda.usual_instances() if op == "rational"]
    compile_cuda.precompile(instances, "sm_90")
    files = {compile_cuda.cubin_name(op, name, "sm_90") for op, name in instances}
    assert len(files) == 4 and files == {path.name for path in tmp_path.glob("*.cubin")}


@needs_compiler
def test_nvrtc_error_names_the_kernel():
    with pytest.raises(compile_cuda.BuildError, match=r"NVRTC failed on forward<nothing> of .*cuda.cu for sm_90"):
        compile_cuda.compile_kernel("rational", "forward<nothing>", "sm_90")


def test_a_cold_kernel_is_refused_in_a_graph(monkeypatch):
    """Loading a module may be forbidden while a graph is captured: said before anything is compiled."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(compile_cuda, "_kernel", None)
    with pytest.raises(RuntimeError, match="rational forward<nothing>: .* run once before the capture"):
        compile_cuda.loaded("rational", "forward<nothing>", "sm_90")


def test_kernel_arguments_are_named():
    name, x, table = template("forward", torch.float32, torch.float32, 4), torch.zeros(3, 4), torch.zeros(10, 4)
    named = dict(x=x, table=table, rows=3, C=4, split_rows=16, y=x)
    values = compile_cuda.arguments("rational", name, **named)
    assert values == [x.data_ptr(), table.data_ptr(), 3, 4, 16, x.data_ptr()]
    scan = compile_cuda.parameters("selective_scan", template("carry", torch.float32, True))
    assert [p.name for p in scan] == ["boundary", "sums", "A", "B", "G", "N", "D", "segments"]
    strided = {p.name: (p.argument, p.stride) for p in compile_cuda.parameters("wkv", "bi_sweep<float, true>")}
    assert strided["dy_"] == ("dy", None) and strided["dy_token"] == ("dy", 1) and strided["y_"] == ("y", None)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(y=None), None),
        (dict(rows=3.0), "rows is integer, got 3.0"),
        (dict(x=3), "x is a tensor or None, got 3"),
        (dict(x=torch.zeros(3, dtype=torch.float64)), "x has elements of torch.float32, got torch.float64"),
        (dict(z=1), "unknown arguments z"),
    ),
)
def test_kernel_arguments_must_fit(change, message):
    name = template("forward", torch.float32, torch.float32, 4)
    named = (
        dict(x=torch.zeros(3, 4), table=torch.zeros(10, 4), rows=3, C=4, split_rows=16, y=torch.zeros(3, 4)) | change
    )
    if message is None:
        assert compile_cuda.arguments("rational", name, **named)[-1] == 0
        del named["rows"]
        message = "no argument 'rows'"
    with pytest.raises(TypeError, match=f"rational {name}: {message}"):
        compile_cuda.arguments("rational", name, **named)


@needs_compiler
def test_cuda_compile_is_kept_on_disk(monkeypatch, tmp_path):
    """The second process reads the cubin; another architecture is another file."""
    monkeypatch.setattr(kernel_cache, "cache_dir", lambda: tmp_path)
    name = template("forward", torch.float32, torch.float32, 4)
    compiled = compile_cuda.cubin("rational", name, "sm_90")
    file = compile_cuda.cubin_name("rational", name, "sm_90")
    assert (tmp_path / file).exists() and file != compile_cuda.cubin_name("rational", name, "sm_80")
    monkeypatch.setattr(compile_cuda, "compile_kernel", None)
    assert compile_cuda.cubin("rational", name, "sm_90") == compiled
    assert not list(tmp_path.glob("*.partial"))


def test_segments_cover_every_step():
    device = torch.device("cpu")
    for steps in (1, 63, 64, 65, 1000, 3136, 16384):
        for parallel in (32, 4096, 10**7):
            count, length = compile_cuda.segments(steps, parallel, device)
            assert (count - 1) * length < steps <= count * length and length % 16 == 0
    assert compile_cuda.segments(16384, 32, device)[0] > 100 and compile_cuda.segments(16384, 10**7, device)[0] == 1


# --- values and gradients: by the emulator here, by `on_gpu` below ----------------------------------------------------


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def order_of(*shape, length):
    """Orders that visit ``shape[-1]`` of `length` tokens."""
    rows = torch.stack([torch.randperm(length)[: shape[-1]] for _ in range(math.prod(shape[:-1]))])
    return rows.view(shape).to(torch.int32)


def scan_case(B, L, G, D, N, R, steps=None, batched=False, shared=False, **options):
    x = dict(
        u=normal(B, L, 1 if shared else G, D),
        dt=normal(B, L, G, R or D),
        A=-normal(G, D, N).abs() - 0.1,
        B=normal(B, L, G, N),
    )
    x |= dict(C=normal(B, L, G, N), D=normal(G, D), dt_bias=normal(G, D) - 1)
    x |= dict(dt_weight=normal(G, D, R)) if R else {}
    order = order_of(*((B, G, steps) if batched else (G, steps)), length=L) if steps else None
    return selective_scan, x, dict(order=order, **options)


def initial_scan(B, L, G, D, N, R, **options):
    """Rates as Mamba initialises them: A_n = n A_1, but for roundings."""
    run, x, options = scan_case(B, L, G, D, N, R, **options)
    return run, x | dict(A=-torch.arange(1.0, N + 1).log().exp().expand(G, D, N).double()), options


def bare_scan(B, L, G, D, N):
    x = dict(u=normal(B, L, 1, D).expand(B, L, G, D), dt=normal(B, L, G, D).abs(), A=-normal(G, D, N).abs())
    return selective_scan, x | dict(B=normal(B, L, G, N), C=normal(B, L, G, N)), dict(dt_softplus=False)


def wkv_case(run, B, L, H, N, P, steps=None, decay=0.0, grow=1.0, **options):
    """`decay` is added to w: a number, or one for each of N channels. `grow` multiplies a and b of wkv7."""
    names = dict(r=N, k=N, v=P, w=N) | (dict(a=N, b=N) if run is wkv7 else {})
    x = {name: normal(B, L, H, size) / size**0.5 for name, size in names.items()}
    x["w"] = x["w"] + decay
    x |= {name: x[name] * grow for name in x if name in ("a", "b")}
    x |= dict(u=normal(H, N)) if run is wkv6 else {}
    return run, x, dict(order=order_of(steps, length=L) if steps else None, **options)


def mlstm_case(B, L, H, P, scale=1.0, forget=0.0):
    """`scale` multiplies the gates; `forget` is added to f. (The gradient of a single q is 0, but for roundings.)"""
    x = {name: normal(B, L, H, P) for name in "qkv"} | {name: scale * normal(B, L, H) for name in "if"}
    return mlstm, x | dict(q=x["q"] / (1 if L > 1 else 100), f=x["f"] + forget), {}


def bi_case(B, L, C, steps=None, **options):
    x = dict(k=normal(B, L, C), v=normal(B, L, C), w=normal(C), u=normal(C))
    return bi_wkv, x, dict(order=order_of(B, steps, length=L) if steps else None, **options)


def conv_case(B, L, G, C, K, bias=True, order=False, activation=None):
    x = dict(x=normal(B, L, G, C), weight=normal(G, C, K)) | (dict(bias=normal(G, C)) if bias else {})
    order = order_of(*torch.Size((G, L)), length=L) if order else None

    def run(x, weight, bias=None, order=None):  # the operator: the public function calls it for CUDA tensors alone
        weight, bias = weight.to(sums_dtype(x)), None if bias is None else bias.to(sums_dtype(x))
        return torch.ops.linzoo.causal_conv1d(x, weight, bias, order, activation == "silu")

    run.__name__ = "causal_conv1d"
    return run, x, dict(order=order)


def sums_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def deform_case(B, H, W, G, D, K=3, **options):
    padding, stride, dilation = (options.get(k, 1) for k in ("padding", "stride", "dilation"))
    rows, columns = ((n + 2 * padding - dilation * (K - 1) - 1) // stride + 1 for n in (H, W))
    offset = (8 * normal(B, rows, columns, G, K * K, 2)).floor() / 8 + 1 / 16  # no point on a pixel, where slopes jump
    x = dict(x=normal(B, H, W, G * D), offset=offset)
    return deform_conv, x | dict(weight=normal(B, rows, columns, G, K * K)), options


def diagonal_case(shape, inner, initial=True, **options):
    B, L = shape[:2]
    x = dict(a=0.5 * normal(*inner, 2).tanh(), b=normal(*shape, 2))
    return diagonal_scan, x | (dict(initial=normal(B, *shape[2:], 2)) if initial else {}), options


def kernel_case(H, N, L, channels=None, rank=None, **options):
    x = dict(A=normal(H, N, 2), B=normal(H, N, 2), C=normal(*(channels or ()), H, N, 2), dt=normal(H).abs() / 10 + 0.01)
    x["A"][..., 0] = -x["A"][..., 0].abs() - 0.1
    x |= dict(P=normal(rank, H, N, 2) / 3) if rank else {}
    return ssm_kernel, x, dict(length=L, **options)


def rational_case(rows, C, numerators, denominators):
    return rational, dict(x=normal(rows, C), numerator=normal(numerators, 6), denominator=normal(denominators, 4)), {}


# Groups that read the same u: several segments; no low rank; one channel at a time; several states.
SHARED = [
    lambda: scan_case(2, 300, 4, 32, 1, 2, steps=290, shared=True, merge=True),
    lambda: scan_case(1, 40, 3, 40, 1, 0, shared=True),
    lambda: scan_case(1, 33, 2, 37, 1, 3, shared=True, merge=True),
    lambda: scan_case(1, 530, 2, 34, 3, 2, steps=520, shared=True, merge=True),
]
CASES = {
    "selective_scan": [
        lambda: scan_case(2, 150, 2, 37, 1, 3, steps=141),
        lambda: scan_case(1, 150, 3, 40, 1, 0, merge=True),
        lambda: scan_case(2, 20, 2, 140, 2, 2, steps=19, batched=True, merge=True),
        lambda: scan_case(1, 70, 1, 33, 5, 2, merge=True),
        lambda: bare_scan(1, 97, 2, 9, 3),
        lambda: scan_case(1, 530, 2, 96, 1, 6, steps=520),
        lambda: scan_case(2, 70, 1, 128, 1, 5, merge=True),
        lambda: scan_case(1, 40, 2, 64, 1, 2, steps=37, batched=True, merge=True),
        lambda: bare_scan(1, 2400, 1, 8, 1),  # ten segments
        lambda: scan_case(1, 300, 1, 34, 2, 3),
        lambda: scan_case(1, 40, 1, 128, 1, 50, merge=True),
        *SHARED,
        lambda: initial_scan(1, 300, 2, 34, 4, 3, steps=290, merge=True),
        lambda: initial_scan(1, 70, 1, 40, 16, 0),
    ],
    "wkv": [
        lambda: bi_case(2, 150, 37, steps=141),
        lambda: bi_case(1, 300, 130, divide_by_length=True),
        lambda: bi_case(3, 7, 5),
        lambda: wkv_case(wkv6, 2, 37, 2, 19, 19, steps=30),
        lambda: wkv_case(wkv6, 1, 20, 1, 40, 33, bidirectional=False),
        lambda: wkv_case(wkv7, 2, 37, 2, 19, 19, steps=30),
        lambda: wkv_case(wkv7, 1, 17, 1, 33, 40),
        # on tensor cores
        *(functools.partial(wkv_case, wkv6, 1, L, 2, 16, 16) for L in (1, 15, 16, 17, 65)),
        *(functools.partial(wkv_case, wkv6, 1, 35, 1, 16, 16, decay=decay) for decay in (-10.0, 2.0, 7.0)),
        lambda: wkv_case(wkv6, 1, 50, 1, 16, 16, decay=torch.linspace(-10, 8, 16)),
        lambda: wkv_case(wkv6, 2, 37, 2, 32, 32, steps=30),
        lambda: wkv_case(wkv6, 1, 130, 1, 64, 64, bidirectional=False),
        *(functools.partial(wkv_case, wkv7, 1, L, 2, 16, 16) for L in (1, 15, 16, 17, 65)),
        *(functools.partial(wkv_case, wkv7, 1, 35, 1, 16, 16, decay=decay) for decay in (-10.0, 2.0, 4.0)),
        lambda: wkv_case(wkv7, 1, 50, 1, 16, 16, decay=torch.linspace(-10, 8, 16)),
        lambda: wkv_case(wkv7, 2, 37, 2, 32, 32, steps=30),
        lambda: wkv_case(wkv7, 1, 130, 1, 64, 64),
    ],
    "mlstm": [
        lambda: mlstm_case(2, 50, 2, 16),
        *(functools.partial(mlstm_case, 1, L, 1, 16) for L in (1, 15, 16, 17, 64, 65, 130)),
        lambda: mlstm_case(1, 70, 2, 96),
        lambda: mlstm_case(1, 70, 1, 19),  # rows that are not read four channels at a time
        *(functools.partial(mlstm_case, 1, 130, 1, 16, 20.0, forget) for forget in (0.0, 10.0)),
        lambda: mlstm_case(1, 130, 1, 16, 3.0, -40.0),
        lambda: mlstm_case(1, 600, 1, 16, 3.0, 3.0),  # gates 256 steps at a time
    ],
    "ssm_kernel": [
        lambda: kernel_case(3, 5, 75),
        lambda: kernel_case(2, 33, 600, channels=(2,), discretization="bilinear"),
        lambda: kernel_case(2, 4, 50, rank=1, discretization="bilinear"),
        lambda: kernel_case(1, 9, 31, channels=(2,), rank=2, discretization="bilinear"),
    ],
    "rational": [lambda: rational_case(130, 87, 1, 3), lambda: rational_case(5, 48, 8, 8)],
    "deform_conv": [
        lambda: deform_case(2, 7, 5, 2, 9),
        lambda: deform_case(1, 9, 8, 1, 40, stride=2, dilation=2, padding=2, offset_scale=0.7),
        lambda: deform_case(1, 5, 6, 3, 16, K=1),
    ],
    "diagonal_scan": [
        lambda: diagonal_case((2, 70, 3, 19), (19,), reverse=True),
        lambda: diagonal_case((2, 70, 19), (2, 70, 19), initial=False),
        lambda: diagonal_case((1, 33, 7), (1, 33, 7), reverse=True),
    ],
    "causal_conv1d": [
        lambda: conv_case(2, 70, 2, 37, 4, order=True, activation="silu"),
        lambda: conv_case(1, 33, 1, 130, 3, bias=False),
    ],
}
IDS = [(op, i) for op, cases in CASES.items() for i in range(len(cases))]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def results(run, inputs, options, dtype=None):
    y = run(**inputs, **options)
    torch.manual_seed(1)
    g = torch.randn(y.shape, dtype=torch.float64).to(dtype or y.dtype).to(y)
    return [y, *torch.autograd.grad(y, list(inputs.values()), g)]


def prepare(inputs, dtype, device="cpu"):
    """Leaves in `dtype`, parameters too: the operators read those in the dtype of their sums."""
    return {name: x.detach().to(device, dtype).requires_grad_() for name, x in inputs.items()}


def assert_case(case, dtype, compute, device="cpu"):
    """`compute(run, inputs, options)` against the reference on the CPU in float64, on the same rounded inputs."""
    torch.manual_seed(0)
    run, inputs, options = case()
    inputs = {name: x.to(dtype).double() for name, x in inputs.items()}
    with use_backend("reference"):
        expected = results(run, prepare(inputs, torch.float64), options, dtype)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = compute(run, prepare(inputs, dtype, device), options)
    for name, a, b in zip(("y", *inputs), got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        error = (a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1e-30)  # what underflows may be 0
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


def serves(op, dtype):  # ssm_kernel computes in float32 at least, mlstm in float32
    return not (op == "ssm_kernel" and dtype.itemsize == 2 or op == "mlstm" and dtype == torch.float64)


def every_case(*dtypes):
    return [(op, case, dtype) for op, case in IDS for dtype in dtypes if serves(op, dtype)]


def first_cases(*dtypes):
    return [(op, 0, dtype) for op in CASES for dtype in dtypes if serves(op, dtype)]


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    every_case(torch.float32, torch.bfloat16) + first_cases(torch.float64, torch.float16),
    ids=str,
)
def test_emulated(emulated_cuda, op, case, dtype):
    emulated_cuda(op)
    assert_case(CASES[op][case], dtype, results)


def test_emulated_without_saved_states(emulated_cuda):
    """Without gradients nothing is saved; a backward pass by hand computes the states anew."""
    torch.manual_seed(0)
    emulated_cuda("selective_scan")
    _, x, options = scan_case(1, 40, 1, 5, 2, 0)
    x = {k: v.float() for k, v in x.items()}
    arguments = [x.get(k) for k in ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")]
    y, states = torch.ops.linzoo.selective_scan(*arguments, True, None, False, False)
    assert states.numel() == 0
    dy, again = torch.randn_like(y), torch.ops.linzoo.selective_scan(*arguments, True, None, False, True)
    assert torch.equal(y, again[0])
    grads = [torch.ops.linzoo.selective_scan_backward(dy, *arguments, True, None, False, s) for s in (states, again[1])]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@contextlib.contextmanager
def algorithms(deterministic):
    """The session's own setting is deterministic as far as possible, with a warning where it is not."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def test_emulated_deterministic_merge(emulated_cuda):
    torch.manual_seed(0)
    emulated_cuda("selective_scan")
    run, x, options = scan_case(2, 40, 3, 5, 1, 0, steps=39, merge=True)
    with algorithms(deterministic=True):
        in_order = run(**x, **options)
    with algorithms(deterministic=False):
        torch.testing.assert_close(run(**x, **options), in_order)
        half = {k: v.bfloat16() for k, v in x.items()}
        torch.testing.assert_close(run(**half, **options), in_order.bfloat16(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", range(len(SHARED)))
def test_emulated_shared_inputs_get_one_gradient(emulated_cuda, monkeypatch, case, dtype):
    """Their gradient is summed over groups by the kernel: no group's own is ever allocated."""
    emulated_cuda("selective_scan")
    backward, written = selective_scan_cuda.backward, []
    monkeypatch.setattr(selective_scan_cuda, "backward", lambda **x: (written.append(x["du"]), backward(**x)))
    with algorithms(deterministic=False):
        assert_case(SHARED[case], dtype, results)
    assert [(x.shape[2], x.dtype) for x in written] == [(1, torch.float32)]


def test_emulated_powers_of_the_first_decay(emulated_cuda):
    """A warp takes them if A_n = n A_1 in all its channels; the results are as of exponentials, but for roundings."""
    torch.manual_seed(0)
    emulated_cuda("selective_scan")
    run, x, options = initial_scan(1, 100, 1, 64, 16, 2)

    def results_of_32(change):
        A = x["A"].float()
        A[0, 31, 5] *= 1 + change  # in the last channel of the first warp
        return run(**{k: v.float() for k, v in x.items()} | dict(A=A), **options)[..., :31]

    powers, other, another = (results_of_32(change) for change in (0, 1e-4, 1e-5))
    assert torch.equal(other, another) and not torch.equal(powers, other)
    assert (powers - other).abs().max() <= 2e-6 * other.abs().max()


def test_emulated_empty_batch(emulated_cuda):
    cases = {
        "selective_scan": scan_case(0, 20, 2, 5, 1, 2, merge=True),
        "wkv": wkv_case(wkv6, 0, 20, 2, 5, 5),
        "mlstm": mlstm_case(0, 20, 2, 16),
        "rational": rational_case(0, 6, 1, 2),
        "deform_conv": deform_case(0, 4, 4, 1, 3),
        "diagonal_scan": diagonal_case((0, 5, 3), (3,)),
        "causal_conv1d": conv_case(0, 9, 1, 4, 3),
    }
    for op, (run, x, options) in cases.items():
        emulated_cuda(op)
        y, *grads = results(run, prepare(x, torch.float32), options)
        assert y.shape[0] == 0 and all(g.eq(0).all() for g in grads)


def test_deform_conv_says_that_it_is_not_deterministic(emulated_cuda):
    emulated_cuda("deform_conv")
    run, x, options = deform_case(1, 4, 4, 1, 4)
    x = {k: v.requires_grad_() for k, v in x.items()}
    with (
        algorithms(deterministic=True),
        pytest.raises(RuntimeError, match="deform_conv has no deterministic backward pass on CUDA"),
    ):
        results(run, x, options)


def test_scans_that_shared_memory_does_not_hold_fall_back_aloud(emulated_cuda):
    emulated_cuda("selective_scan")
    run, x, options = scan_case(1, 2, 1, 4, 100, 3)
    with pytest.warns(RuntimeWarning, match="reference: 100 states of rank 3 want .* of a block's 49152 of shared"):
        run(**x, **options)


def test_wide_heads_fall_back_aloud(emulated_cuda):
    emulated_cuda("wkv")
    run, x, options = wkv_case(wkv6, 1, 3, 1, 130, 4)
    with pytest.warns(RuntimeWarning, match="wkv runs on its slow PyTorch reference: .* at most 128 channels, got 130"):
        run(**x, **options)


def test_mlstm_in_float64_falls_back_aloud(emulated_cuda):
    emulated_cuda("mlstm")
    run, x, options = mlstm_case(1, 5, 1, 4)
    with pytest.warns(
        RuntimeWarning, match="mlstm runs on its slow PyTorch reference: .* in float32, got torch.float6"
    ):
        run(**x, **options)


def assert_keeps_digits(run, x, options, tolerance):
    """In float32, beside the reference in float64 on the same numbers; of y and every gradient."""
    x = {name: t.float() for name, t in x.items()}
    got = results(run, prepare(x, torch.float32), options)
    with use_backend("reference"):
        expected = results(run, prepare({n: t.double() for n, t in x.items()}, torch.float64), options, torch.float32)
    for name, a, b in zip(("y", *x), got, expected, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


def test_emulated_mlstm_does_not_lose_digits_with_length(emulated_cuda):
    """Gates that forget next to nothing, or all at times: differences of sums are taken in double precision."""
    torch.manual_seed(0)
    emulated_cuda("mlstm")
    run, x, options = mlstm_case(1, 1000, 1, 16, forget=8.0)
    x["f"][:, ::50] = -3000
    assert_keeps_digits(run, x, options, 2e-5)


@pytest.mark.parametrize("run", (wkv6, wkv7))
def test_emulated_wkv_does_not_lose_digits_with_length(emulated_cuda, run):
    """Tensor cores round towards 0: what a slow decay sums over many chunks must not be summed by them."""
    torch.manual_seed(0)
    emulated_cuda("wkv")
    run, x, options = wkv_case(run, 1, 1000, 1, 16, 16, decay=-10.0)
    if run is wkv7:  # as in RWKV-7: each step overwrites a part of what its key finds
        x["a"] = -torch.nn.functional.normalize(x["a"], dim=-1)
        x["b"] = -x["a"] * x["b"].sigmoid()
    assert_keeps_digits(run, x, options, 6e-6)


GROWING = functools.partial(wkv_case, wkv7, 1, 35, 1, 16, 16, decay=-3.0, grow=6.0)


def test_emulated_wkv7_that_grows(emulated_cuda):
    """To 1e23 in 35 steps: the scores of a with b are large, and so is the inverse of their triangle."""
    emulated_cuda("wkv")
    assert_case(GROWING, torch.float32, results)


def test_tensor_cores_serve_wkv_where_they_fit(monkeypatch):
    def served(N, P, dtype=torch.float32):
        return wkv_cuda.on_tensor_cores(torch.zeros(1, 1, 1, N, dtype=dtype), torch.zeros(1, 1, 1, P, dtype=dtype))

    assert [N for N in range(1, 129) if served(N, N)] == [16, 32, 64]
    assert not (served(64, 32) or served(64, 64, torch.float64))
    monkeypatch.setattr(compile_cuda, "_capability", lambda index: (7, 5))
    assert not compile_cuda.has_tf32(torch.device("cuda:0"))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def on_gpu(run, inputs, options):
    torch.cuda.synchronize()
    return results(run, inputs, options)


@gpu
@pytest.mark.parametrize(("op", "case", "dtype"), every_case(*TOLERANCE), ids=str)
def test_gpu_equals_reference(op, case, dtype):
    assert_case(CASES[op][case], dtype, on_gpu, "cuda")


@gpu
def test_gpu_wkv7_that_grows():
    assert_case(GROWING, torch.float32, on_gpu, "cuda")


def gpu_scan():
    torch.manual_seed(0)
    _, x, _ = scan_case(2, 96, 4, 48, 1, 3)
    x = {k: v.float().cuda().requires_grad_() for k, v in x.items()}
    return x, dict(order=scan_order.cross(8, 12, torch.device("cuda")), merge=True)


def opcheck(op, case, device):
    """`torch.library.opcheck` of what the public function of a case calls."""
    torch.manual_seed(0)
    run, x, options = CASES[op][case]()
    x = {k: v.float().to(device).requires_grad_() for k, v in x.items()}
    order = None if options.get("order") is None else options["order"].to(device)
    operator = getattr(torch.ops.linzoo, run.__name__).default
    tail = {
        "bi_wkv": (order, True),
        "causal_conv1d": (order, True),
        "deform_conv": (1, 1, 1, 1.0),
        "diagonal_scan": (True,),
        "mlstm": (64, True),
        "rational": (),
        "selective_scan": (True, order, False, True),
        "wkv6": (order, True, True),
        "wkv7": (order, True),
    }[run.__name__]
    if run is selective_scan:
        x = {name: x.get(name) for name in ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")}
    if run is wkv7:
        x = {name: x[name] for name in ("r", "w", "k", "v", "a", "b")}
    if run is diagonal_scan:  # states between batch, time and (re, im) are one axis
        inner = x["b"].shape[2:-1]
        x["a"] = x["a"].expand(*inner, 2).flatten(0, -2).detach().clone().requires_grad_()
        x["b"], x["initial"] = (x[n].detach().flatten(i, -2).requires_grad_() for n, i in (("b", 2), ("initial", 1)))
    torch.library.opcheck(operator, (*x.values(), *tail))


OPCHECKS = [
    ("wkv", 3),
    ("wkv", 5),
    ("wkv", 16),
    ("wkv", 27),
    *((op, 0) for op in CASES if op != "ssm_kernel"),
]  # that one is two operators


@pytest.mark.parametrize(("op", "case"), OPCHECKS)
def test_emulated_opcheck(emulated_cuda, op, case):
    emulated_cuda(op)
    opcheck(op, case, "cpu")


@gpu
@pytest.mark.parametrize(("op", "case"), OPCHECKS)
def test_gpu_opcheck(op, case):
    opcheck(op, case, "cuda")


@gpu
def test_gpu_compile_and_graph_capture():
    x, options = gpu_scan()
    expected = selective_scan(**x, **options)
    compiled = torch.compile(selective_scan, fullgraph=True)
    torch.testing.assert_close(compiled(**x, **options), expected)
    x = {k: v.detach() for k, v in x.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_scan(**x, **options)
    x["u"].mul_(2)
    graph.replay()
    torch.testing.assert_close(y, selective_scan(**x, **options))


@gpu
def test_gpu_stream_and_autocast():
    x, options = gpu_scan()
    expected = selective_scan(**x, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = selective_scan(**x, **options)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, expected)
    half = {k: v.bfloat16() if k in ("u", "dt", "B", "C") else v for k, v in x.items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = selective_scan(**half, **options)
    assert y.dtype == torch.bfloat16 and (y.float() - expected).abs().max() < 0.05 * expected.abs().max()


@gpu
def test_gpu_deterministic_gradients():
    x, options = gpu_scan()
    with algorithms(deterministic=True):
        runs = [results(selective_scan, x, options) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gpu_atomic_merge(dtype):
    """What users run: without deterministic algorithms, groups are merged by atomic sums. Any order of them will do."""
    x, options = gpu_scan()
    with algorithms(deterministic=True):
        expected = selective_scan(**x, **options)
    low = {k: v.to(dtype) if k in ("u", "dt", "B", "C") else v for k, v in x.items()}
    with algorithms(deterministic=False):
        for _ in range(20):
            y = selective_scan(**low, **options)
            error = (y.float() - expected).abs().max() / expected.abs().max()
            assert y.dtype == dtype and error < (1e-5 if dtype == torch.float32 else 2e-2)


@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", range(len(SHARED)))
def test_gpu_shared_inputs_get_one_gradient(case, dtype):
    """As above, by atomic sums, in any order."""
    with algorithms(deterministic=False):
        for _ in range(5):
            assert_case(SHARED[case], dtype, on_gpu, "cuda")


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_second_device():
    x, options = gpu_scan()
    expected = selective_scan(**x, **options)
    x = {k: v.detach().to("cuda:1") for k, v in x.items()}
    y = selective_scan(**x, order=options["order"].to("cuda:1"), merge=True)
    torch.testing.assert_close(y.to("cuda:0"), expected)


@gpu
def test_gpu_more_than_2_31_elements():
    elements = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 12 * elements:
        pytest.skip("needs 26 GB of GPU memory")
    channels, dtype = 4096, torch.bfloat16
    length = elements // channels
    u = torch.ones(1, length, 1, channels, dtype=dtype, device="cuda")
    dt = torch.ones(1, length, 1, 1, dtype=dtype, device="cuda")
    ones = torch.ones(1, length, 1, 1, dtype=dtype, device="cuda")
    A = -torch.ones(1, channels, 1, device="cuda")
    y = selective_scan(u, dt, A, ones, ones, dt_weight=torch.ones(1, channels, 1, device="cuda"), dt_softplus=False)
    limit = 1 / (1 - torch.exp(torch.tensor(-1.0)))  # of h = exp(-1) h + 1
    torch.testing.assert_close(y[0, -1, 0].float().cpu(), limit.expand(channels), rtol=1e-2, atol=0)
    assert y[0, 0, 0].eq(1).all()


@gpu
def test_gpu_public_causal_conv1d():
    torch.manual_seed(0)
    x, weight, bias = normal(2, 30, 2, 9).float(), normal(2, 9, 4).float(), normal(2, 9).float()
    expected = causal_conv1d(x, weight, bias, activation="silu")
    got = causal_conv1d(x.cuda(), weight.cuda(), bias.cuda(), activation="silu")
    torch.testing.assert_close(got.cpu(), expected)
