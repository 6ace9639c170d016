"""float32 matrix products by oneDNN."""

import subprocess
import sys

import pytest
import torch

from linzoo.ops import onednn, use_onednn


def calls(function):
    """Names of the operators that `function()` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        function()
    return {event.name for event in profile.events() or ()}


BY_ONEDNN = "mkldnn::_linear_pointwise"


@pytest.fixture
def matrices():
    """Makes an (m, k) and a (k, n) matrix, either of them transposed in memory."""
    generator = torch.Generator().manual_seed(0)

    def make(m, k, n, a_transposed=False, b_transposed=False):
        a = torch.randn(k, m, generator=generator).t() if a_transposed else torch.randn(m, k, generator=generator)
        b = torch.randn(n, k, generator=generator).t() if b_transposed else torch.randn(k, n, generator=generator)
        return a, b

    return make


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("m, k, n", [(256, 96, 200), (200, 300, 64), (48, 700, 192), (2, 2048, 1000), (1000, 4000, 1)])
def test_products_of_any_layout(matrices, m, k, n, a_transposed, b_transposed):
    a, b = matrices(m, k, n, a_transposed, b_transposed)
    bias, exact = torch.linspace(-1, 1, n), a.double() @ b.double()
    with use_onednn():
        products = {
            "mm": (a @ b, exact),
            "addmm": (torch.addmm(bias, a, b), exact + bias),
            "scaled": (torch.addmm(bias, a, b, beta=0.5, alpha=-2), 0.5 * bias - 2 * exact),
            "row of biases": (torch.addmm(bias[:, None][:1], a, b), exact + bias[0]),
            "out": (torch.mm(a, b, out=torch.empty(n, m).t()), exact),
            "addmm out": (torch.addmm(bias, a, b, out=torch.empty(m, n)), exact + bias),
            "resized": (torch.mm(a, b, out=torch.empty(0)), exact),
        }
    for name, (y, expected) in products.items():
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
        assert name == "out" or y.is_contiguous()


@pytest.mark.parametrize("m, k, n", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_matrices(m, k, n):
    with use_onednn():
        assert (torch.ones(m, k) @ torch.ones(k, n)).shape == (m, n)


def test_expanded_matrices():
    a, b = torch.randn(1, 300).expand(200, 300), torch.randn(300, 1).expand(300, 200)
    with use_onednn():
        torch.testing.assert_close(a @ b, a.clone() @ b.clone())


def test_which_products_it_takes():
    large, small = torch.ones(256, 128), torch.ones(8, 8)
    with use_onednn():
        assert BY_ONEDNN in calls(lambda: large @ large.t())
        assert BY_ONEDNN not in calls(lambda: small @ small)
        assert BY_ONEDNN not in calls(lambda: large.double() @ large.double().t())
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            large @ large
        with pytest.raises(RuntimeError, match="same dtype"):
            large @ large.t().double()
    assert BY_ONEDNN not in calls(lambda: large @ large.t())


def test_blocks_nest_and_end_after_an_error():
    assert not onednn.is_used()
    with pytest.raises(KeyError), use_onednn():
        with use_onednn():
            pass
        assert onednn.is_used()
        raise KeyError
    assert not onednn.is_used()


def test_gradients():
    layer, x = torch.nn.Linear(192, 256), torch.randn(4, 50, 192, requires_grad=True)

    def grads():
        return torch.autograd.grad(layer(x).sin().sum(), [x, *layer.parameters()])

    expected = grads()
    with use_onednn():
        assert BY_ONEDNN in calls(grads)
        found = grads()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(grad.is_contiguous() for grad in found)


def test_transforms():
    a, b = torch.randn(3, 256, 96), torch.randn(96, 128)
    with use_onednn():
        torch.testing.assert_close(torch.func.vmap(torch.mm, (0, None))(a, b), a @ b)
        _, tangent = torch.func.jvp(lambda x: x @ b, (a[0],), (a[1],))
    torch.testing.assert_close(tangent, a[1] @ b)


def test_under_autocast():
    a, b = torch.randn(256, 96), torch.randn(96, 128)
    with use_onednn(), torch.autocast("cpu", torch.bfloat16):
        y = a @ b
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), a @ b, rtol=0.1, atol=0.5)


@pytest.mark.slow
def test_compiled():
    layer, x = torch.nn.Linear(192, 256), torch.randn(100, 192)
    with use_onednn(), torch.no_grad():
        run = torch.compile(layer)
        torch.testing.assert_close(run(x), layer(x))
        assert BY_ONEDNN in calls(lambda: run(x))


@pytest.mark.parametrize("value, result", [("onednn", "True"), ("", "False"), ("mkl", "expected 'onednn' or nothing")])
def test_environment_variable(monkeypatch, value, result):
    monkeypatch.setenv("LINZOO_MATMUL", value)
    code = "import linzoo.ops.onednn as o; print(o.is_used())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result in run.stdout + run.stderr


def test_pytorch_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="built without oneDNN"), use_onednn():
        pass
