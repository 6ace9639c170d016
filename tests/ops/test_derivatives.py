"""Second derivatives, forward mode and `torch.func` transforms of every operator."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from linzoo.ops import (
    backend,
    bi_wkv,
    causal_conv1d,
    deform_conv,
    depthwise_conv2d,
    diagonal_scan,
    fft_conv,
    gated_delta,
    mlstm,
    nc_ssd,
    rational,
    scan_order,
    selective_scan,
    ssd,
    ssm_kernel,
    wkv6,
    wkv7,
)

pytestmark = pytest.mark.filterwarnings("ignore:linzoo.ops.* runs on its slow PyTorch reference")


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def scan_inputs(B=2, L=6, G=2, D=3, N=2, R=2):
    x = dict(u=normal(B, L, G, D), dt=normal(B, L, G, R), A=-normal(G, D, N).abs() - 0.1, B=normal(B, L, G, N))
    return x | dict(C=normal(B, L, G, N), D=normal(G, D), dt_weight=normal(G, D, R), dt_bias=normal(G, D))


def both(*shape):
    return dict(B=normal(*shape), C=normal(*shape))


def heads(*names, B=2, L=5, H=2, N=3):
    return {name: normal(B, L, H, N) / 2 for name in names}


def kernel_inputs(rank):
    A = normal(2, 3, 2) * torch.tensor([0.3, 2.0]) - torch.tensor([1.0, 0.0])
    x = dict(A=A, B=normal(2, 3, 2), C=normal(2, 3, 2), dt=0.1 * normal(2).exp())
    return x | (dict(P=0.3 * normal(rank, 2, 3, 2)) if rank else {})


def dplr_kernel(**x):
    return ssm_kernel(**x, length=5, discretization="bilinear")


ORDER = scan_order.cross(2, 3)[:2]
CASES = {
    "selective_scan": lambda: (lambda **x: selective_scan(**x, order=ORDER), scan_inputs()),
    "selective_scan_merge": lambda: (lambda **x: selective_scan(**x, merge=True), scan_inputs()),
    "selective_scan_shared": lambda: (selective_scan, scan_inputs() | dict(u=normal(2, 6, 1, 3))),
    "bi_wkv": lambda: (bi_wkv, dict(k=normal(2, 5, 3), v=normal(2, 5, 3), w=normal(3), u=normal(3))),
    "wkv6": lambda: (wkv6, heads("r", "k", "v", "w") | dict(u=normal(2, 3))),
    "wkv7": lambda: (wkv7, heads("r", "w", "k", "v", "a", "b")),
    "diagonal_scan": lambda: (
        lambda **x: diagonal_scan(**x, reverse=True),
        dict(a=normal(3, 2) / 2, b=normal(2, 5, 3, 2), initial=normal(2, 3, 2)),
    ),
    "diagonal_scan_varying": lambda: (diagonal_scan, dict(a=normal(2, 5, 3, 2) / 2, b=normal(2, 5, 3, 2))),
    "rational": lambda: (rational, dict(x=normal(3, 4), numerator=normal(2, 6), denominator=normal(1, 4))),
    "deform_conv": lambda: (
        deform_conv,
        dict(
            x=normal(1, 3, 4, 4),
            offset=(8 * normal(1, 3, 4, 2, 9, 2)).floor() / 8 + 1 / 16,
            weight=normal(1, 3, 4, 2, 9),
        ),
    ),
    "depthwise_conv2d": lambda: (
        lambda **x: depthwise_conv2d(**x, padding=2, dilation=2),
        dict(x=normal(1, 4, 5, 2), weight=normal(2, 3, 3), bias=normal(2)),
    ),
    "ssm_kernel": lambda: (lambda **x: ssm_kernel(**x, length=5), kernel_inputs(0)),
    "ssm_kernel_low_rank": lambda: (dplr_kernel, kernel_inputs(1)),
    "causal_conv1d": lambda: (
        lambda **x: causal_conv1d(**x, order=ORDER, activation="silu"),
        dict(x=normal(2, 6, 2, 3), weight=normal(2, 3, 4), bias=normal(2, 3)),
    ),
    "fft_conv": lambda: (fft_conv, dict(u=normal(2, 5, 3), kernels=normal(3, 4))),
    "fft_conv_map": lambda: (
        lambda u, rows, columns: fft_conv(u, [rows, columns], [rows, columns]),
        dict(u=normal(2, 3, 2, 3), rows=normal(3, 3), columns=normal(3, 2)),
    ),
    "ssd": lambda: (
        lambda **x: ssd(**x, chunk_size=2),
        dict(
            x=normal(2, 5, 2, 2),
            dt=normal(2, 5, 2).abs(),
            A=-normal(2).abs(),
            B=normal(2, 5, 1, 2),
            C=normal(2, 5, 1, 2),
        ),
    ),
    "mlstm": lambda: (
        lambda **x: mlstm(**x, chunk_size=2),
        heads("q", "k", "v") | dict(i=normal(2, 5, 2), f=normal(2, 5, 2)),
    ),
    "gated_delta": lambda: (
        lambda **x: torch.cat([y.flatten(1) for y in gated_delta(**x, chunk_size=2)], 1),
        heads("q", "k", "v") | dict(g=normal(2, 5, 2), beta=normal(2, 5, 2), initial=normal(2, 2, 3, 3)),
    ),
    "nc_ssd": lambda: (
        nc_ssd,
        dict(x=normal(2, 5, 2, 2), weight=normal(2, 5, 2), B=normal(2, 5, 2), C=normal(2, 5, 2)),
    ),
}


def case(name):
    run, inputs = CASES[name]()
    return (lambda *tensors: run(**dict(zip(inputs, tensors, strict=True)))), list(inputs.values())


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name):
    run, inputs = case(name)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_the_slope(name):
    """By `torch.func.jvp` and by dual numbers, against central differences."""
    run, inputs = case(name)
    tangents, h = [torch.randn_like(x) for x in inputs], 1e-6
    ahead, behind = (run(*(x + s * h * t for x, t in zip(inputs, tangents, strict=True))) for s in (1, -1))
    slope = (ahead - behind) / (2 * h)
    value, ours = jvp(run, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(value, run(*inputs))
    torch.testing.assert_close(ours, slope, rtol=1e-6, atol=1e-6 * slope.abs().max().item())
    with forward_ad.dual_level():
        dual = run(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, ours)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_samples(name):
    """`vmap(grad)` gives every sample's gradient, of shared tensors too: those of a loop."""
    run, inputs = case(name)
    batch = [torch.stack([x, 1.1 * x, 0.9 * x]) for x in inputs[:1]]
    rest, names = inputs[1:], tuple(range(len(inputs)))

    def loss(*tensors):
        return run(*tensors).square().sum()

    ours = vmap(grad(loss, names), (0, *(None for _ in rest)))(*batch, *rest)
    for i in range(3):
        leaves = [x.detach().requires_grad_() for x in (batch[0][i], *rest)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a[i], b)


def test_hessian_and_third_derivatives():
    run, inputs = case("selective_scan")

    def slope(u):
        return torch.autograd.grad(run(u, *inputs[1:]).pow(3).sum(), u, create_graph=True)[0]

    u = inputs[0].requires_grad_()
    rows = torch.autograd.grad(slope(u)[0, 0, 0, 0], u)[0]
    torch.testing.assert_close(hessian(lambda u: run(u, *inputs[1:]).pow(3).sum())(inputs[0])[0, 0, 0, 0], rows)
    assert torch.autograd.gradgradcheck(lambda u: slope(u).square(), (u,), fast_mode=True)


def test_said_once(recwarn):
    run, inputs = case("rational")
    x = [t.requires_grad_() for t in inputs]
    backend._warn_once.cache_clear()
    for _ in range(2):
        grads = torch.autograd.grad(run(*x).square().sum(), x, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), x)
    said = [str(w.message) for w in recwarn if "second derivatives" in str(w.message)]
    assert len(said) == 1 and "linzoo.ops.rational" in said[0]


def test_strict_forbids_what_has_no_kernel(monkeypatch):
    run, inputs = case("rational")
    x = [t.requires_grad_() for t in inputs]
    monkeypatch.setenv("LINZOO_STRICT", "1")
    grads = torch.autograd.grad(run(*x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="LINZOO_STRICT=1 .* rational: second derivatives"):
        torch.autograd.grad(grads[0].sum(), x)


def test_parameters_of_an_ensemble():
    """`vmap` over parameters alone, as `torch.func.stack_module_state` makes them."""
    run, inputs = case("bi_wkv")
    w = torch.stack([inputs[2], 2 * inputs[2]])
    together = vmap(run, (None, None, 0, None))(*inputs[:2], w, inputs[3])
    alone = torch.stack([run(*inputs[:2], w_i, inputs[3]) for w_i in w])
    torch.testing.assert_close(together, alone)
