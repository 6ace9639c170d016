"""Depthwise convolution: the kernel of its weights' gradient against PyTorch's convolution."""

import pytest
import torch
from torch.autograd import gradcheck

from linzoo.ops import depthwise_conv2d, use_backend

# H, W, C, K, K', padding, dilation: odd sizes, padding of all kinds, more taps than are summed at once, several bands.
SHAPES = [
    (7, 9, 19, 3, 3, 2, 2),
    (14, 14, 32, 3, 3, 0, 3),
    (5, 6, 16, 9, 9, 4, 1),
    (9, 30, 17, 3, 5, (1, 0), 1),
    (6, 6, 5, 5, 5, 4, 1),
    (70, 33, 3, 5, 5, 2, 1),
    (1, 40, 2, 1, 10, (0, 5), 1),
]


def make_inputs(H, W, C, K, J, dtype=torch.float64, B=2):
    inputs = dict(x=torch.randn(B, H, W, C), weight=torch.randn(C, K, J), bias=torch.randn(C))
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def results(inputs, backend, **options):
    with use_backend(backend):
        y = depthwise_conv2d(**inputs, **options)
        return [y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(shape, dtype):
    *sizes, padding, dilation = shape
    inputs, options = make_inputs(*sizes, dtype), dict(padding=padding, dilation=dilation)
    for ours, expected in zip(results(inputs, "cpu", **options), results(inputs, "reference", **options), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_slice_of_a_map_and_no_bias():
    inputs = make_inputs(20, 21, 6, 3, 3)
    inputs |= dict(x=torch.randn(2, 30, 30, 9, dtype=torch.float64)[:, 3:23, 4:25, 2:8].requires_grad_())
    del inputs["bias"]
    torch.testing.assert_close(results(inputs, "cpu", dilation=5), results(inputs, "reference", dilation=5))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_sums_in_float32(dtype):
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in make_inputs(30, 30, 16, 5, 5).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    g = torch.randn(2, 30, 30, 16).to(dtype)
    y = depthwise_conv2d(**low, padding=2)
    torch.testing.assert_close(depthwise_conv2d(low["x"], exact["weight"], exact["bias"], padding=2), y)
    grads = torch.autograd.grad(y, list(low.values()), g)
    for ours, expected in zip(
        grads, torch.autograd.grad(depthwise_conv2d(**exact, padding=2), list(exact.values()), g.double()), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_gradcheck():
    inputs = make_inputs(4, 5, 2, 3, 3, B=1)
    assert gradcheck(lambda *a: depthwise_conv2d(*a, padding=2, dilation=2), tuple(inputs.values()))


def test_which_calls_take_the_operator():
    """Those whose gradients PyTorch computes slowly: wide or dilated windows, float32 as its weights, not compiled."""

    def taken(padding=2, dilation=2, K=3, grad=True, autocast=False):
        inputs = make_inputs(9, 9, 4, K, K, torch.float32)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
            y = depthwise_conv2d(**inputs, padding=padding, dilation=dilation)
        return "linzoo" in str(y.grad_fn)

    assert taken() and taken(K=5, dilation=1)
    assert not any((taken(dilation=1, padding=1), taken(grad=False), taken(autocast=True), taken(padding=5)))


def test_operator():
    inputs = make_inputs(7, 8, 3, 3, 3, torch.float32)
    torch.library.opcheck(torch.ops.linzoo.depthwise_conv2d.default, (*inputs.values(), 2, 2, 2))


def test_threads_do_not_change_the_weights_gradient():
    inputs, before = make_inputs(40, 33, 40, 3, 3, torch.float32), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(results(inputs, "cpu", dilation=3)[2:])
    torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_compile_and_export():
    inputs = make_inputs(9, 9, 4, 5, 5, torch.float32)
    expected = depthwise_conv2d(**inputs, padding=2)
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, padding=2), expected)

    class Model(torch.nn.Module):
        def forward(self, x, weight, bias):
            return depthwise_conv2d(x, weight, bias, padding=2)

    program = torch.export.export(Model(), tuple(inputs.values()))
    assert all("linzoo" not in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs.values()), expected)


def test_bad_arguments():
    x, weight = torch.randn(1, 5, 6, 3), torch.randn(3, 3, 3)
    with pytest.raises(ValueError, match=r"padding, dilation: expected >= 0, >= 1, got -1, 1"):
        depthwise_conv2d(x, weight, padding=-1)
    with pytest.raises(ValueError, match="got .*, 0"):
        depthwise_conv2d(x, weight, dilation=0)
    with pytest.raises(
        ValueError, match="x: a 5 x 6 map with padding .* smaller than the window of 3 x 3 taps, dilation 3"
    ):
        depthwise_conv2d(x, weight, dilation=3)
    with pytest.raises(ValueError, match="weight: expected"):
        depthwise_conv2d(x, weight[:2])
