"""Programs that hold a selective scan: torch.export keeps the operator, ONNX gets one Scan node; both at any length."""

import pytest
import torch

from linzoo.ops import selective_scan, use_backend

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
