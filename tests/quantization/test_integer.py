"""Integer arithmetic by torchao: every linear map is reached, and what it computes is close."""

import copy
import sys
from collections import Counter

import pytest
import timm
import torch
from test_invariances import built, images
from torch import nn

from linzoo.backbones.layers import S6, GroupedLinear
from linzoo.backbones.layers.vim_mixer import CausalConv
from linzoo.quantization.integer import float_linears, per_group, pt2e, qdq, weight_only
from linzoo.tools import benchmark
from linzoo.tools.export import to_onnx

pytest.importorskip("torchao")


def single(family):
    return copy.deepcopy(built(family)).float()


@torch.no_grad()
def error(found, model, x):
    expected = model(x)
    return float((found(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["vim", *(pytest.param(f, marks=pytest.mark.slow) for f in ("groupmamba", "vssd"))])
def test_every_linear_map_has_integer_inputs(family):
    model, batch = single(family), images(torch.float32)
    graph = pt2e(model, [batch])
    linears = [node for node in graph.graph.nodes if node.target == torch.ops.aten.linear.default]
    per_module = {nn.Linear: lambda m: 1, S6: lambda m: m.groups, GroupedLinear: lambda m: len(m.weight)}
    assert len(linears) == sum(per_module[type(m)](m) for m in model.modules() if type(m) in per_module)
    assert float_linears(graph) == []
    for node in linears:
        for argument in node.args[:2]:
            assert "dequantize" in str(argument.target)
        inputs, weight = (argument.args[0] for argument in node.args[:2])
        assert "quantize_per_tensor" in str(inputs.target) and inputs.args[-1] == torch.uint8
        assert getattr(graph, weight.target).dtype == torch.int8
    assert error(graph, model, batch) < 0.3
    assert 2 * benchmark.saved_bytes(graph) < benchmark.saved_bytes(model), "only integers are left"
    plain = torch.export.export(model, (batch,), strict=True).module()
    assert float_linears(plain), "else the check sees nothing"


@torch.no_grad()
@pytest.mark.parametrize("family", ["vim", "groupmamba"])
def test_groups_compute_the_same(family):
    model, x = built(family), images(torch.float64)
    torch.testing.assert_close(per_group(model)(x), model(x), rtol=1e-12, atol=1e-12)
    assert {type(m) for m in model.modules()} & {S6, GroupedLinear}, "the model itself stays"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["vim", "groupmamba"])
def test_onnx_maps_have_integer_inputs(family, tmp_path):
    """Every linear map and convolution of the file reads integers, the scans' products do not."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = single(family), images(torch.float32)
    layers = sum(isinstance(m, (nn.Linear, nn.Conv2d, CausalConv)) for m in model.modules())
    layers += sum(m.groups for m in model.modules() if isinstance(m, S6))
    layers += sum(len(m.weight) for m in model.modules() if isinstance(m, GroupedLinear))
    to_onnx(per_group(model), x, {0: torch.export.Dim.AUTO}, tmp_path / "float.onnx")
    count = qdq(tmp_path / "float.onnx", [x, x.flip(-1)], tmp_path / "int8.onnx")
    assert count == layers
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    made = {output: node.op_type for node in nodes for output in node.output}
    kinds = Counter(made[n.input[0]] for n in nodes if n.op_type in ("MatMul", "Gemm", "Conv"))
    assert kinds["DequantizeLinear"] == count
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(lambda _: torch.from_numpy(found), model, x) < 0.3
    sizes = [(tmp_path / name).stat().st_size for name in ("float.onnx", "int8.onnx")]
    assert sizes[1] < sizes[0]


def test_weights_alone():
    model, x = single("vssd"), images(torch.float32)
    found = weight_only(model)
    assert 0 < error(found, model, x) < 0.2
    for name, module in found.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.qdata.dtype == torch.int8, name
    assert benchmark.saved_bytes(found) < benchmark.saved_bytes(model)


def test_wrong_arguments():
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="images: expected batches of one shape, got none"):
        pt2e(linear, [])
    with pytest.raises(ValueError, match=r"images: expected batches of one shape, got \[\(1, 4\), \(2, 4\)\]"):
        pt2e(linear, [torch.ones(2, 4), torch.ones(1, 4)])
    with pytest.raises(ValueError, match="model: expected linear maps, got none in ReLU"):
        weight_only(nn.ReLU())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_missed_maps_are_an_error(monkeypatch):
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="expected 2 linear maps with integer inputs, but only 1 of them are in"):
        pt2e(Unused(), [x])
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    monkeypatch.setattr(x86.X86InductorQuantizer, "set_global", lambda self, config: self)
    with pytest.raises(ValueError, match="expected 1 linear maps with integer inputs, but 'linear' is not quantised"):
        pt2e(nn.Linear(4, 4), [x])


def test_without_torchao(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    for make in (weight_only, lambda model: pt2e(model, [torch.ones(1, 4)])):
        with pytest.raises(ImportError, match=r"torchao is missing; pip install 'linzoo\[quantize\]'"):
            make(nn.Linear(4, 4))


def test_table(monkeypatch, tmp_path, capsys):
    """Every arithmetic has its row; nothing is compiled here."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(benchmark, "create", lambda name, size: timm.create_model(name, depths=(1, 1, 1, 1), dim=32))
    file = tmp_path / "quantized.json"
    command = ["quantized", "--models", "vssd_m", "--size", "32", "--batch", "2", "--budget", "0", "--compile"]
    benchmark.main([*command, "--json", str(file)])
    said = capsys.readouterr()
    [table] = benchmark.tables_of(file)
    names = [row["arithmetic"] for row in table["rows"]]
    assert names == [
        "float32", "bfloat16", "8-bit weights (torchao)", "float32, compiled", "8-bit PT2E, compiled"
    ]  # fmt: skip
    size = {row["arithmetic"]: row["bytes"] for row in table["rows"]}
    assert size["8-bit PT2E, compiled"] < size["bfloat16"] < size["float32"]
    for row in table["rows"]:
        assert row["error"] == 0 if row["arithmetic"].startswith("float32") else 0 < row["error"] < 1
        assert row["arithmetic"] in said.out.replace("\n", " ") and f"vssd_m, {row['arithmetic']}: made" in said.err


@pytest.mark.parametrize(
    "options, line",
    [
        (("--models", "vim_z"), "--models: timm knows no vim_z"),
        (("--models", "vssd_m", "--batch", "0"), "--batch and --size must be positive"),
    ],
)
def test_bad_input(options, line, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["quantized", *options])
    assert ended.value.code == 2 and line in capsys.readouterr().err
