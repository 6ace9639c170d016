"""diagonal_scan: the recurrence step by step, the CPU kernel against the reference, and gradcheck."""

import pytest
import torch
from torch.autograd import gradcheck

from linzoo.ops import diagonal_scan, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make_inputs(shape=(2, 7, 3, 5), per_step=False, initial=True, dtype=torch.float64, shared=1):
    gain = shape if per_step else shape[len(shape) - shared :]
    a, b = 0.6 * torch.randn(*gain, 2, dtype=torch.float64).tanh(), torch.randn(*shape, 2, dtype=torch.float64)
    tensors = [a, b] + ([torch.randn(shape[0], *shape[2:], 2, dtype=torch.float64)] if initial else [])
    return [t.to(dtype).requires_grad_() for t in tensors]


def results(inputs, backend, reverse):
    with use_backend(backend):
        h = diagonal_scan(*inputs, reverse=reverse)
        torch.manual_seed(1)
        return [h, *torch.autograd.grad(h, inputs, torch.randn_like(h))]


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("per_step", (False, True))
def test_recurrence(per_step, reverse):
    a, b, state = (t.detach() for t in make_inputs(per_step=per_step))
    with use_backend("cpu"):
        h = torch.view_as_complex(diagonal_scan(a, b, state, reverse=reverse))
    a, b, state = (torch.view_as_complex(t) for t in (a, b, state))
    for t in reversed(range(7)) if reverse else range(7):
        state = (a[:, t] if per_step else a) * state + b[:, t]
        torch.testing.assert_close(h[:, t], state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize(
    ("shape", "per_step", "initial", "shared"),
    (
        ((1, 1, 1), False, False, 1),
        ((3, 5, 33), False, True, 1),
        ((2, 4, 3, 17), True, False, 1),
        ((2, 6, 2, 9), False, False, 2),
    ),
)
def test_cpu_equals_reference(dtype, shape, per_step, initial, shared, reverse):
    inputs = make_inputs(shape, per_step, initial, dtype, shared)
    names, runs = ("h", "a", "b", "initial"), [results(inputs, backend, reverse) for backend in ("cpu", "reference")]
    for name, got, expected in zip(names[: len(inputs) + 1], *runs, strict=True):
        assert got.dtype == expected.dtype == dtype and got.shape == expected.shape
        scale = expected.double().abs().max().clamp(min=1e-3)
        assert (got.double() - expected.double()).abs().max() <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("per_step", (False, True))
@pytest.mark.parametrize("reverse", (False, True))
def test_gradcheck(backend, per_step, reverse):
    with use_backend(backend):
        assert gradcheck(lambda *x: diagonal_scan(*x, reverse=reverse), make_inputs((2, 4, 2, 3), per_step))


def test_reverse_is_the_flipped_scan():
    a, b, initial = make_inputs()
    expected = diagonal_scan(a, b.flip(1), initial).flip(1)
    assert torch.equal(diagonal_scan(a, b, initial, reverse=True), expected)


def test_empty_batch_and_views():
    for shape in ((0, 5, 6), (3, 5, 6)):
        inputs = make_inputs(shape)
        inputs[1] = inputs[1].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for got, expected in zip(results(inputs, "cpu", False), results(inputs, "reference", False), strict=True):
            torch.testing.assert_close(got, expected)


def test_opcheck():
    for per_step in (False, True):
        a, b, initial = make_inputs((2, 4, 5), per_step, dtype=torch.float32)
        for state in (initial, None):
            torch.library.opcheck(torch.ops.linzoo.diagonal_scan.default, (a, b, state, True))
            h, a_, state = (None if t is None else t.detach() for t in (b, a, state))
            torch.library.opcheck(torch.ops.linzoo.diagonal_scan_backward.default, (h, a_, state, True, h))


def test_results_do_not_depend_on_threads():
    inputs, threads = make_inputs((5, 40, 33), dtype=torch.float32), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(inputs, "cpu", False))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_compile_export_and_autocast():
    a, b, initial = make_inputs(dtype=torch.float32)
    expected = diagonal_scan(a, b, initial)
    compiled = torch.compile(diagonal_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, initial), expected)
    with use_backend("export"):
        torch.testing.assert_close(diagonal_scan(a, b, initial), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert diagonal_scan(a, b.bfloat16(), initial).dtype == torch.bfloat16

    class Scan(torch.nn.Module):
        def forward(self, a, b):
            return diagonal_scan(a, b)

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Scan(), (a, b), dynamic_shapes={"a": {}, "b": {1: length}}).module()
    longer = torch.cat([b, b], 1)
    torch.testing.assert_close(program(a, longer), diagonal_scan(a, longer))


def test_bad_arguments():
    a, b, initial = make_inputs()
    with pytest.raises(ValueError, match=r"b: every size but the batch must be positive, got \(2, 0, 3, 5, 2\)"):
        diagonal_scan(a, b[:, :0])
    with pytest.raises(ValueError, match=r"a: expected .* = \(2, 7, 3, 5, 2\), got \(4, 2\)"):
        diagonal_scan(a[1:], b)
    with pytest.raises(ValueError, match=r"initial: expected \(B, ..., P, 2\) = \(2, 3, 5, 2\), got \(2, 3, 4, 2\)"):
        diagonal_scan(a, b, initial[:, :, 1:])
    with pytest.raises(TypeError, match="b: .*int64"):
        diagonal_scan(a, b.long())
    with pytest.raises(ValueError, match="a: expected on cpu as b, got meta"):
        diagonal_scan(a.to("meta"), b)
