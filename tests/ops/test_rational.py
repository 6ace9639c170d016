"""rational: the published kernels' values and gradients, the CPU kernel against the reference, and gradcheck."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from linzoo.ops import rational, use_backend

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_inputs(shape=(3, 7, 48), numerators=1, denominators=8, dtype=torch.float64):
    tensors = torch.randn(shape, dtype=torch.float64), torch.randn(numerators, 6), torch.randn(denominators, 4)
    return [t.to(dtype).requires_grad_() for t in tensors]


def results(inputs, backend):
    with use_backend(backend):
        y = rational(*inputs)
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(y, inputs, torch.randn_like(y))]


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", ("op_rational", "op_rational_grouped", "op_rational_zero_den"))
def test_parity(name, backend):
    case = json.loads((PARITY / "ops" / f"{name}.json").read_text())
    state = {k: torch.from_numpy(v).requires_grad_() for k, v in synth.state_dict(case).items()}
    numerator, denominator = state.values()
    x = torch.from_numpy(synth.image(case["inputs"][0]["shape"], case["inputs"][0]["seed"])).requires_grad_()
    with use_backend(backend):
        y = rational(x, numerator, denominator)
        grads = torch.autograd.grad(y, (x, numerator, denominator), torch.ones_like(y))
    for out, ours in zip(case["outputs"], (y, *grads), strict=True):
        where = slice(None) if out["index"] == "all" else out["index"]
        got, expected = ours.detach().double().flatten()[where], torch.tensor(out["value"], dtype=torch.float64)
        assert list(ours.shape) == out["shape"]
        assert (got - expected).abs().max() <= case.get("tolerance", 2e-5) * max(out["std"], expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), (((5, 48), (1, 8)), ((2, 3, 87), (3, 1)), ((130, 100), (4, 10)), ((1, 3), (1, 3)))
)
def test_cpu_equals_reference(dtype, shape, groups):
    inputs = make_inputs(shape, *groups, dtype)
    for name, got, expected in zip("yxab", results(inputs, "cpu"), results(inputs, "reference"), strict=True):
        assert got.dtype == expected.dtype == dtype and got.shape == expected.shape
        scale = expected.double().abs().max()
        assert (got.double() - expected.double()).abs().max() <= TOLERANCE[dtype] * scale, name


def test_empty_batch_and_views():
    for inputs in (make_inputs((0, 16)), make_inputs((6, 16))):
        inputs[0] = inputs[0].detach().t().contiguous().t().requires_grad_()
        for got, expected in zip(results(inputs, "cpu"), results(inputs, "reference"), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_gradcheck(backend):
    with use_backend(backend):
        assert gradcheck(rational, make_inputs((4, 6), 2, 3))


def test_opcheck():
    inputs = make_inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.linzoo.rational.default, inputs)
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.linzoo.rational_backward.default, (detached[0], *detached))


def test_denominators_that_begin_at_zero_learn():
    x, numerator, _ = make_inputs()
    denominator = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    rational(x, numerator, denominator).sum().backward()
    assert (denominator.grad != 0).all()


def test_results_do_not_depend_on_threads():
    inputs, threads = make_inputs((200, 87), 1, 3, torch.float32), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(inputs, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_compile_export_and_autocast():
    x, numerator, denominator = make_inputs(dtype=torch.float32)
    compiled = torch.compile(rational, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, numerator, denominator), rational(x, numerator, denominator))
    with use_backend("export"):
        torch.testing.assert_close(rational(x, numerator, denominator), results((x, numerator, denominator), "cpu")[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rational(x.bfloat16(), numerator, denominator)
    assert y.dtype == torch.bfloat16


def test_bad_arguments():
    x, numerator, denominator = make_inputs()
    with pytest.raises(ValueError, match=r"numerator: expected \(G, 6\) .* got \(1, 5\)"):
        rational(x, numerator[:, :5], denominator)
    with pytest.raises(ValueError, match="denominator: 7 groups do not divide the channels"):
        rational(x, numerator, denominator[:7])
    with pytest.raises(TypeError, match="x: .*int64"):
        rational(x.long(), numerator, denominator)
    with pytest.raises(ValueError, match="numerator: expected on cpu as x, got meta"):
        rational(x, numerator.to("meta"), denominator)
