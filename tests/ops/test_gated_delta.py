"""Gated delta rule: kernel and WY form against the recurrence; states, gradients, precision, programs, bad input."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from linzoo.ops import gated_delta, use_backend

gated_delta_module = importlib.import_module("linzoo.ops.gated_delta")  # the function has its folder's name


def make_inputs(B=2, L=37, H=3, K=4, P=5, dtype=torch.float64, initial=True):
    inputs = {name: torch.randn(B, L, H, K, dtype=dtype) for name in "qk"}
    inputs["k"] = F.normalize(inputs["k"], dim=-1)
    inputs |= {"v": torch.randn(B, L, H, P, dtype=dtype), "g": F.logsigmoid(2 * torch.randn(B, L, H, dtype=dtype))}
    inputs["beta"] = torch.randn(B, L, H, dtype=dtype).sigmoid()
    if initial:
        inputs["initial"] = torch.randn(B, H, K, P, dtype=dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def results(inputs, backend, **options):
    with use_backend(backend):
        y, state = gated_delta(**inputs, **options)
        return [y, state, *torch.autograd.grad(y.square().sum() + state.pow(3).sum(), list(inputs.values()))]


@pytest.fixture(params=("kernel", "products"))
def way(request, monkeypatch):
    """By the CPU's kernel, and by what serves devices without one."""
    if request.param == "products":
        monkeypatch.setattr(gated_delta_module._operator, "devices", ())


@pytest.mark.parametrize("L", (1, 7, 16, 37, 64))
@pytest.mark.parametrize("chunk_size", (1, 8, 64))
@pytest.mark.parametrize("initial", (True, False))
def test_equals_the_recurrence(L, chunk_size, initial, way):
    inputs = make_inputs(L=L, initial=initial)
    ours, expected = results(inputs, None, chunk_size=chunk_size), results(inputs, "reference")
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


def test_by_hand():
    """A key's value is moved by beta towards the new one, after the decay; other keys keep theirs."""
    k = torch.tensor([[1.0, 0], [0, 1], [1, 0]]).view(1, 3, 1, 2)
    v, beta = torch.tensor([4.0, 8, 2]).view(1, 3, 1, 1), torch.tensor([1.0, 1, 0.25]).view(1, 3, 1)
    g = torch.tensor([0.0, 0, 0.5]).log().nan_to_num(neginf=0).view(1, 3, 1)  # halves before the last step
    y, state = gated_delta(k, k, v, g, beta)
    assert y.flatten().tolist() == pytest.approx([4, 8, 2 + 0.25 * (2 - 2)])
    assert state.flatten().tolist() == pytest.approx([2, 4])


def test_states_join_parts(way):
    """Two halves, the state of the first handed to the second, are the whole: streaming."""
    inputs = make_inputs(L=50)
    whole, state = gated_delta(**inputs, chunk_size=8)
    parts, last = [], inputs["initial"]
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        y, last = gated_delta(*(inputs[name][:, part] for name in ("q", "k", "v", "g", "beta")), last, chunk_size=8)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(last, state)


def test_state_alone_and_output_alone_have_gradients(way):
    inputs = make_inputs()
    y, state = gated_delta(**inputs)
    with use_backend("reference"):
        y_, state_ = gated_delta(**inputs)
    leaves = list(inputs.values())
    ours, expected = (torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (y, y_))
    torch.testing.assert_close(ours, expected)
    ours = torch.autograd.grad(state.sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(state_.sum(), leaves, allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_the_future_is_not_seen():
    inputs = {name: x.detach() for name, x in make_inputs(initial=False).items()}
    later = {name: torch.cat([x[:, :20], torch.randn_like(x[:, 20:])], 1) for name, x in inputs.items()}
    torch.testing.assert_close(
        gated_delta(**later, chunk_size=8)[0][:, :20], gated_delta(**inputs, chunk_size=8)[0][:, :20]
    )


def test_strong_decays_neither_overflow_nor_turn_nan(way):
    inputs = {name: x.detach() for name, x in make_inputs(L=300, dtype=torch.float32).items()}
    for scale in (1e-6, 1, 1e3):
        leaves = {name: x.requires_grad_() for name, x in (inputs | {"g": scale * inputs["g"]}).items()}
        for ours, expected in zip(results(leaves, None), results(leaves, "reference"), strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_gradcheck(way):
    inputs = tuple(make_inputs(B=1, L=6, H=2, K=2, P=3).values())
    assert gradcheck(lambda *a: gated_delta(*a, chunk_size=4), inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_keeps_its_states_in_float32(dtype):
    low = {name: x.detach().to(dtype) for name, x in make_inputs(L=200).items()}
    (y, state), (exact, last) = gated_delta(**low), gated_delta(**{name: x.double() for name, x in low.items()})
    assert y.dtype == dtype and state.dtype == torch.float32
    assert (y - exact).abs().max() <= (2 * torch.finfo(dtype).eps + 1e-5) * exact.abs().max()
    assert (state - last).abs().max() <= 1e-5 * last.abs().max()


def test_autocast_leaves_the_states_alone():
    inputs = {name: x.detach() for name, x in make_inputs(L=100, dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta(**inputs)
    torch.testing.assert_close(found, gated_delta(**inputs), rtol=0, atol=0)


def test_views_and_other_memory_layouts():
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    torch.testing.assert_close(gated_delta(**turned), gated_delta(**inputs))


def test_empty_batch():
    inputs = make_inputs(B=0)
    y, state = gated_delta(**inputs)
    assert y.shape == (0, 37, 3, 5) and state.shape == (0, 3, 4, 5)


def test_any_number_of_threads_gives_the_same_bits():
    """More heads than a thread takes together; few of them, whose columns are split; columns that fill no vector."""
    threads = torch.get_num_threads()
    for sizes in (dict(B=5, H=5, P=21), dict(B=1, H=3, P=80)):
        inputs, found = make_inputs(**sizes, L=70, K=6, dtype=torch.float32), []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(results(inputs, None))
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(*found, rtol=0, atol=0)
        torch.testing.assert_close(found[0], results(inputs, "reference"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("save", (True, False))
def test_opcheck(save):
    for L in (1, 40):
        inputs = make_inputs(B=1, L=L, H=2, K=3, P=2)
        torch.library.opcheck(torch.ops.linzoo.gated_delta.default, (*inputs.values(), 4, save))


class Model(torch.nn.Module):
    def forward(self, q, k, v, g, beta, initial):
        return gated_delta(q, k, v, g, beta, initial)


def test_compile_and_export():
    inputs = make_inputs()
    compiled = torch.compile(gated_delta, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), gated_delta(**inputs))
    length = torch.export.Dim("length", min=2, max=4096)
    values = tuple(x.detach() for x in inputs.values())
    shapes = {name: {} if name == "initial" else {1: length} for name in inputs}
    program = torch.export.export(Model(), values, dynamic_shapes=shapes)
    assert any(node.target is torch.ops.linzoo.gated_delta.default for node in program.graph.nodes)
    for L in (3, 130):
        values = tuple(x.detach() for x in make_inputs(L=L).values())
        torch.testing.assert_close(program.module()(*values), gated_delta(*values))


def test_export_backend_equals_the_chunks():
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    expected = gated_delta(**inputs)
    with use_backend("export"), torch.no_grad():
        torch.testing.assert_close(gated_delta(**inputs), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    """One Scan node, of any length."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    inputs = make_inputs(dtype=torch.float32)
    values = tuple(x.detach() for x in inputs.values())
    shapes = {name: {} if name == "initial" else {1: torch.export.Dim("length", min=2, max=4096)} for name in inputs}
    path = tmp_path / "gated_delta.onnx"
    with use_backend("export"), torch.no_grad():
        torch.onnx.export(Model(), values, str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node].count("Scan") == 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for L in (5, 90):
        inputs = {name: x.detach() for name, x in make_inputs(L=L, dtype=torch.float32).items()}
        got = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        for ours, expected in zip(got, gated_delta(**inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"beta: expected \(B, L, H\) = \(2, 37, 3\), got \(2, 36, 3\)"):
        gated_delta(**{**inputs, "beta": inputs["beta"][:, 1:]})
    with pytest.raises(ValueError, match=r"initial: expected \(B, H, K, P\) = \(2, 3, 4, 5\), got \(2, 3, 5, 4\)"):
        gated_delta(**{**inputs, "initial": inputs["initial"].mT})
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        gated_delta(**inputs, chunk_size=0)
