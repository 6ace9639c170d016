"""Programs that hold a selective scan: torch.export keeps the operator, ONNX gets one Scan node; both at any length."""

import pytest
import torch

from linzoo.ops import bi_wkv, mlstm, selective_scan, use_backend, wkv6
from linzoo.ops.aoti import linked
from linzoo.ops.selective_scan import reference
from linzoo.ops.self_check import EXAMPLES

G, D, N, R = 4, 8, 2, 1


class Bidirectional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(G, D, N))
        self.D = torch.nn.Parameter(torch.ones(G, D))
        self.weight = torch.nn.Parameter(torch.randn(G, D, R))
        self.bias = torch.nn.Parameter(torch.randn(G, D) - 3)

    def forward(self, u, dt, B, C):
        forth = torch.arange(u.shape[1])
        order = torch.stack([forth, forth.flip(0)] * 2)
        options = dict(dt_weight=self.weight, dt_bias=self.bias, order=order, merge=True)
        return selective_scan(u, dt, self.A, B, C, self.D, **options)


def inputs(length):
    return tuple(torch.randn(2, length, G, size) for size in (D, R, N, N))


@pytest.fixture
def dynamic_length():
    length = torch.export.Dim("length", min=2, max=4096)
    return {name: {1: length} for name in ("u", "dt", "B", "C")}


def test_export_keeps_the_operator(dynamic_length):
    model = Bidirectional()
    program = torch.export.export(model, inputs(24), dynamic_shapes=dynamic_length)
    assert any(node.target is torch.ops.linzoo.selective_scan.default for node in program.graph.nodes)
    for length in (3, 24, 100):
        xs = inputs(length)
        torch.testing.assert_close(program.module()(*xs), model(*xs), rtol=0, atol=0)


def test_exported_program_trains(dynamic_length):
    model, xs = Bidirectional(), inputs(40)
    program = torch.export.export(model, inputs(24), dynamic_shapes=dynamic_length).module()
    program(*xs).square().sum().backward()
    model(*xs).square().sum().backward()
    ours, theirs = dict(program.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_export_backend_equals_the_kernel():
    model, xs = Bidirectional(), inputs(37)
    expected = model(*xs)
    with use_backend("export"), torch.no_grad():
        torch.testing.assert_close(model(*xs), expected, rtol=1e-5, atol=1e-5)


def scan_of_one_state(L):
    """Also decays whose products vanish, and an order that skips tokens and depends on the image."""
    u, dt, B, C = torch.randn(2, L, G, D), 4 * torch.randn(2, L, G, D), torch.randn(2, L, G, 1), torch.randn(2, L, G, 1)
    order = torch.stack([torch.stack([torch.randperm(L)[: max(L - 3, 1)] for _ in range(G)]) for _ in range(2)])
    A = -30 * torch.rand(G, D, 1)
    return lambda: selective_scan(u, dt, A, B, C, torch.ones(G, D), order=order)


def wkv6_of_all_decays(L):
    r, k, v, w = (torch.randn(2, L, 3, D) for _ in range(4))
    w = 4 * w
    w[0, L // 2], w[1, L // 3] = 60.0, -60.0  # forget everything, nothing
    return lambda: wkv6(r, k, v, w, torch.ones(3, D))


def bi_wkv_of_large_keys(L):
    k, v = 40 * torch.randn(2, L, D), torch.randn(2, L, D)
    order = torch.randperm(L)
    return lambda: bi_wkv(k, v, torch.linspace(-2, 4, D), torch.linspace(-30, 3, D), order=order)


def mlstm_of_large_gates(L):
    q, k, v = (torch.randn(2, L, 3, D) for _ in range(3))
    return lambda: mlstm(q, k, v, 8 * torch.ones(2, L, 3), torch.linspace(-20, 20, L).expand(2, 3, L).mT)


@pytest.mark.parametrize("make", [scan_of_one_state, bi_wkv_of_large_keys, wkv6_of_all_decays, mlstm_of_large_gates])
@pytest.mark.parametrize("L", (1, 2, 15, 16, 17, 50, 197))
def test_chunks_equal_the_kernel(make, L):
    torch.manual_seed(0)
    run = make(L)
    expected = run()
    with use_backend("export_chunked"), torch.no_grad():
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)


def test_softplus_without_log1p():
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-torch.inf, torch.inf, 0.0])])
    expected = torch.nn.functional.softplus(x.double()).float()
    torch.testing.assert_close(reference._softplus(x), expected, rtol=1e-6, atol=0)


class Examples(torch.nn.Module):
    """Every operator that has a kernel, once."""

    def forward(self, inputs):
        return [EXAMPLES[op](torch.zeros)[0](**named) for op, named in inputs.items()]


@pytest.mark.slow
def test_package_holds_every_kernel(tmp_path, run_alone):
    """Another process runs them without LinZoo."""
    torch.manual_seed(0)
    inputs = {op: make(torch.randn)[1] for op, make in EXAMPLES.items()}
    with use_backend("aoti"), torch.no_grad():
        program = torch.export.export(Examples(), (inputs,))
    package = str(tmp_path / "kernels.pt2")
    with linked(program) as configs:
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
    for op, y, expected in zip(inputs, run_alone(package, inputs), Examples()(inputs), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, msg=lambda text, op=op: f"{op}: {text}")


@pytest.mark.slow
def test_onnx_in_chunks_loops_over_them_alone(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Model(torch.nn.Module):
        def forward(self, x, w):
            y = selective_scan(
                x, w, -torch.ones(3, D, 1), x[..., :1], x[..., 1:2], order=torch.arange(19).expand(3, -1)
            )
            return mlstm(wkv6(x, y, x, w, torch.ones(3, D)), x, x, w[..., 0], w[..., 1])

    xs = torch.randn(2, 2, 19, 3, D).unbind()
    batch = torch.export.Dim("batch", min=1, max=64)
    with use_backend("export_chunked"), torch.no_grad():
        program = torch.onnx.export(
            Model().eval(), xs, dynamic_shapes=({0: batch}, {0: batch}), dynamo=True, verbose=False
        )
    loops = [node for node in program.model.graph if node.op_type in ("Scan", "Loop")]
    assert len(loops) == 5 and max(node.outputs[-1].shape[0] for node in loops) < 19  # of 19 tokens
    program.save(tmp_path / "chunks.onnx")
    session, xs = onnxruntime.InferenceSession(tmp_path / "chunks.onnx"), torch.randn(2, 3, 19, 3, D).unbind()
    [found] = session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), xs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), Model()(*xs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_is_one_scan_of_any_length(dynamic_length, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Bidirectional().eval()
    with use_backend("export"), torch.no_grad():
        program = torch.onnx.export(model, inputs(24), dynamic_shapes=dynamic_length, dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph].count("Scan") == 1
    path = tmp_path / "scan.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for length in (24, 61):
        xs = inputs(length)
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), xs, strict=True)}
        got = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(got, model(*xs), rtol=1e-4, atol=1e-5)
