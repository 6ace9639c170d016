"""causal_conv1d against its sum written out."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from linzoo.ops import causal_conv1d, scan_order, use_backend


def make_inputs(B=2, L=12, G=2, C=3, K=4, dtype=torch.float64):
    shapes = ((B, L, G, C), (G, C, K), (G, C))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def both_ways(L):
    forth = torch.arange(L, dtype=torch.int32)
    return torch.stack([forth, forth.flip(0)])


def test_equals_the_sum():
    x, weight, bias = make_inputs()
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    y = causal_conv1d(x, weight, bias, order=order, activation="silu")
    for b, g, t, c in itertools.product(range(2), range(2), range(12), range(3)):
        before = [(k, order[g, t - 3 + k]) for k in range(4) if t - 3 + k >= 0]
        total = bias[g, c] + sum(weight[g, c, k] * x[b, l, g, c] for k, l in before)
        torch.testing.assert_close(y[b, order[g, t], g, c], F.silu(total))


@pytest.mark.parametrize("L", (1, 2, 9))
def test_reversed_order_looks_ahead(L):
    x, weight, _ = make_inputs(L=L)
    x = x[:, :, :1].expand(-1, -1, 2, -1)
    weight = weight[:1].expand(2, -1, -1)
    y = causal_conv1d(x, weight, order=both_ways(L))
    torch.testing.assert_close(causal_conv1d(x.flip(1), weight)[:, :, 0].flip(1), y[:, :, 1])


def test_order_per_batch_item():
    x, weight, bias = make_inputs()
    order = torch.stack([both_ways(12), both_ways(12).flip(0)])
    y = causal_conv1d(x, weight, bias, order=order)
    torch.testing.assert_close(y[1:], causal_conv1d(x[1:], weight, bias, order=order[1]))


@pytest.mark.parametrize("activation", (None, "silu"))
def test_gradcheck(activation):
    order = scan_order.cross(3, 2)[:2]
    assert gradcheck(lambda *a: causal_conv1d(*a, order=order, activation=activation), make_inputs(B=1, L=6))


def results(backend, inputs, **kwargs):
    """Of one backend: y, and the gradients of a loss that every element moves differently."""
    with use_backend(backend) if backend else contextlib.nullcontext():
        y = causal_conv1d(*inputs, **kwargs)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return [y, *torch.autograd.grad(y, [x for x in inputs if x is not None], dy)]


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 4), (2, 33, 2, 17, 3), (1, 200, 2, 40, 2), (2, 70, 1, 16, 4)])
@pytest.mark.parametrize("activation", (None, "silu"))
def test_kernel_equals_the_reference(shape, dtype, tol, activation):
    """Several tiles and segments, channels that fill no vector, tokens shared by groups, with and without bias."""
    B, L, G, C, K = shape
    x, weight, bias = make_inputs(B, L, G, C, K, dtype)
    order = torch.stack([torch.randperm(L) for _ in range(G)])
    for inputs in ((x, weight, bias), (x[:, :, :1].expand(-1, -1, G, -1), weight, None)):
        found, expected = (results(b, inputs, order=order, activation=activation) for b in ("cpu", "reference"))
        for y, z in zip(found, expected, strict=True):
            assert (y - z).double().norm() <= tol * z.double().norm()


def test_any_number_of_threads_gives_the_same_bits():
    inputs = make_inputs(L=300, C=24, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results("cpu", inputs, activation="silu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_counted_operations():
    """A multiply-add per tap and output, on every backend of the operator, as the other operators count."""
    x, weight, _ = make_inputs(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        causal_conv1d(x, weight)
    assert counter.get_total_flops() == x.numel() * 4


def test_other_taps():
    """The kernel has 2 to 4 taps; the reference serves others."""
    inputs = make_inputs(K=5)
    for y, z in zip(results(None, inputs), results("reference", inputs), strict=True):
        torch.testing.assert_close(y, z)
    with pytest.raises(RuntimeError, match="'cpu' is forced, but .* 2 to 4 taps"):
        results("cpu", inputs)


def test_compile_and_dtypes():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = make_inputs(dtype=dtype)
        compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
        y = compiled(x, weight, bias, order=both_ways(12), activation="silu")
        assert y.dtype == dtype
        torch.testing.assert_close(y, causal_conv1d(x, weight, bias, order=both_ways(12), activation="silu"))


def test_bad_arguments():
    x, weight, bias = make_inputs()
    with pytest.raises(ValueError, match="x: expected"):
        causal_conv1d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight: .*got \(1, 3, 4\)"):
        causal_conv1d(x, weight[:1])
    with pytest.raises(ValueError, match=r"bias: .*got \(2, 2\)"):
        causal_conv1d(x, weight, bias[:, :2])
    with pytest.raises(ValueError, match=r"order: .*got \(2, 11\)"):
        causal_conv1d(x, weight, order=both_ways(11))
    with pytest.raises(ValueError, match="activation: .*'gelu'"):
        causal_conv1d(x, weight, activation="gelu")
