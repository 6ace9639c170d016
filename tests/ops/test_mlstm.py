"""mLSTM: the kernel and the chunked products against the recurrence; gradients, precision, programs, bad input."""

import importlib

import pytest
import torch
from torch.autograd import gradcheck

from linzoo.ops import mlstm, use_backend

mlstm_module = importlib.import_module("linzoo.ops.mlstm")  # the function has its folder's name


def make_inputs(B=2, L=37, H=3, P=4, dtype=torch.float64):
    inputs = {name: torch.randn(B, L, H, P, dtype=dtype) for name in "qkv"}
    inputs |= {"i": 3 * torch.randn(B, L, H, dtype=dtype), "f": 3 * torch.randn(B, L, H, dtype=dtype) + 1}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def results(inputs, backend, **options):
    with use_backend(backend):
        y = mlstm(**inputs, **options)
        return [y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))]


@pytest.fixture(params=("kernel", "products"))
def way(request, monkeypatch):
    """By the CPU's kernel, and by what serves devices without one."""
    if request.param == "products":
        monkeypatch.setattr(mlstm_module._operator, "devices", ())


@pytest.mark.parametrize("L", (1, 7, 16, 37, 64))
@pytest.mark.parametrize("chunk_size", (1, 8, 64))
def test_equals_the_recurrence(L, chunk_size, way):
    inputs = make_inputs(L=L)
    ours, expected = results(inputs, None, chunk_size=chunk_size), results(inputs, "reference")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_by_hand(way):
    """Gates of 0 keep half and write all: C_2 = C_1 / 2 + k v; and nothing is read below exp(-m)."""
    q, k, v = (torch.tensor([a, b], dtype=torch.float64).view(1, 2, 1, 1) for a, b in ((1, 1), (2, 4), (3, 5)))
    zero = torch.zeros(1, 2, 1, dtype=torch.float64)
    y = mlstm(q, k, v, zero, zero).flatten()
    assert y.tolist() == pytest.approx([2 * 3 / (2 + 1e-6), (2 * 3 / 2 + 4 * 5) / (2 / 2 + 4 + 1e-6)])
    y = mlstm(q / 100, k, v, zero, zero).flatten()
    assert y.tolist() == pytest.approx([0.06 / (1 + 1e-6), 0.23 / (1 + 1e-6)])


def test_the_future_is_not_seen():
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    later = {name: torch.cat([x[:, :20], torch.randn_like(x[:, 20:])], 1) for name, x in inputs.items()}
    torch.testing.assert_close(mlstm(**later, chunk_size=8)[:, :20], mlstm(**inputs, chunk_size=8)[:, :20])


def test_large_gates_neither_overflow_nor_turn_nan(way):
    inputs = {name: x.detach() for name, x in make_inputs(L=300, dtype=torch.float32).items()}
    for scale in (100, -100):
        leaves = inputs | {"i": scale * inputs["i"], "f": scale * inputs["f"]}
        for value in results({name: x.requires_grad_() for name, x in leaves.items()}, None):
            assert value.isfinite().all()


def test_gradcheck(way):
    assert gradcheck(lambda *a: mlstm(*a, chunk_size=4), tuple(make_inputs(B=1, L=6, H=2, P=2).values()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_keeps_its_states_in_float32(dtype):
    low = {name: x.detach().to(dtype) for name, x in make_inputs(L=200).items()}
    y, exact = mlstm(**low), mlstm(**{name: x.double() for name, x in low.items()})
    assert y.dtype == dtype
    scale = max(exact.abs().max(), 1)  # where n . q is small, its quotient has fewer digits
    assert (y - exact).abs().max() <= (2 * torch.finfo(dtype).eps + 1e-4) * scale


def test_autocast_leaves_the_states_alone():
    inputs = {name: x.detach() for name, x in make_inputs(L=100, dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mlstm(**inputs), mlstm(**inputs), rtol=0, atol=0)
        y = mlstm(**inputs)
    torch.testing.assert_close(y, mlstm(**inputs), rtol=0, atol=0)


def test_any_number_of_threads_gives_the_same_bits():
    """More heads than a thread takes together, and few of them, whose columns are split."""
    threads = torch.get_num_threads()
    for sizes in (dict(B=5, H=5, P=21), dict(B=1, H=3, P=70)):
        inputs, found = make_inputs(**sizes, L=70, dtype=torch.float32), []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(results(inputs, None))
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(*found, rtol=0, atol=0)
        for ours, expected in zip(found[0], results(inputs, "reference"), strict=True):
            assert (ours - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_views_and_other_memory_layouts():
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    torch.testing.assert_close(mlstm(**turned), mlstm(**inputs))


def test_opcheck():
    for L in (1, 11):
        inputs = make_inputs(B=1, L=L, H=2, P=3)
        torch.library.opcheck(torch.ops.linzoo.mlstm.default, (*inputs.values(), 4, True))


def test_compile_and_export():
    inputs = make_inputs()
    compiled = torch.compile(mlstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), mlstm(**inputs))
    length = torch.export.Dim("length", min=2, max=4096)

    class Model(torch.nn.Module):
        def forward(self, q, k, v, i, f):
            return mlstm(q, k, v, i, f)

    values = tuple(x.detach() for x in inputs.values())
    program = torch.export.export(Model(), values, dynamic_shapes={name: {1: length} for name in inputs})
    assert any(node.target is torch.ops.linzoo.mlstm.default for node in program.graph.nodes)
    for L in (3, 130):
        values = tuple(x.detach() for x in make_inputs(L=L).values())
        torch.testing.assert_close(program.module()(*values), mlstm(*values))


def test_export_backend_equals_the_chunks():
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    expected = mlstm(**inputs)
    with use_backend("export"), torch.no_grad():
        torch.testing.assert_close(mlstm(**inputs), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    """One Scan node, of any length."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    class Model(torch.nn.Module):
        def forward(self, q, k, v, i, f):
            return mlstm(q, k, v, i, f)

    values = tuple(x.detach() for x in make_inputs(dtype=torch.float32).values())
    shapes = {name: {1: torch.export.Dim("length", min=2, max=4096)} for name in "qkvif"}
    path = tmp_path / "mlstm.onnx"
    with use_backend("export"), torch.no_grad():
        torch.onnx.export(Model(), values, str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node].count("Scan") == 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for L in (5, 90):
        inputs = {name: x.detach() for name, x in make_inputs(L=L, dtype=torch.float32).items()}
        got = session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(got), mlstm(**inputs), rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"i: expected \(B, L, H\) = \(2, 37, 3\), got \(2, 36, 3\)"):
        mlstm(**{**inputs, "i": inputs["i"][:, 1:]})
    with pytest.raises(ValueError, match=r"q: expected \(B, L, H, P\), got \(37, 3, 4\)"):
        mlstm(**{**inputs, "q": inputs["q"][0]})
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        mlstm(**inputs, chunk_size=0)
