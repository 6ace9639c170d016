"""State-space duality: the kernel and the chunked products against the recurrence, and against the selective scan."""

import pytest
import torch
from torch.autograd import gradcheck

from linzoo.ops import nc_ssd, selective_scan, ssd, ssd_state, use_backend


def make_inputs(B=2, L=37, H=4, P=3, G=2, N=5, dtype=torch.float64):
    inputs = dict(
        x=torch.randn(B, L, H, P, dtype=dtype),
        dt=torch.rand(B, L, H, dtype=dtype),
        A=-2 * torch.rand(H, dtype=dtype),
        B=torch.randn(B, L, G, N, dtype=dtype),
        C=torch.randn(B, L, G, N, dtype=dtype),
        D=torch.randn(H, dtype=dtype),
    )
    return {name: x.requires_grad_() for name, x in inputs.items()}


def make_nc_inputs(**kwargs):
    inputs = make_inputs(G=1, **kwargs)
    x, dt, D = inputs["x"], inputs["dt"], inputs["D"]
    return dict(x=x, weight=dt, B=inputs["B"][:, :, 0], C=inputs["C"][:, :, 0], D=D)


def results(op, inputs, backend, **options):
    with use_backend(backend):
        y = op(**inputs, **options)
        return [y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))]


@pytest.mark.parametrize("L", (1, 7, 16, 37))
@pytest.mark.parametrize("chunk_size", (1, 8, 64))
@pytest.mark.parametrize("backend", ("cpu", "export"))
def test_kernel_and_chunks_equal_the_recurrence(L, chunk_size, backend):
    """ "export" runs the chunked products, as CUDA does."""
    inputs = make_inputs(L=L) | dict(initial=torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True))

    def run(**x):
        y, state = ssd_state(**x, chunk_size=chunk_size)
        return torch.cat([y.flatten(), state.flatten()])

    torch.testing.assert_close(results(run, inputs, backend), results(run, inputs, "reference"))


@pytest.mark.parametrize("G", (1, 4))
def test_wide_heads_with_a_strided_input(G):
    """More channels than a task's columns, and slices of one projection."""
    inputs = {k: v.detach() for k, v in make_inputs(L=70, P=70, N=19, G=G, dtype=torch.float32).items()}
    inputs["x"] = torch.randn(2, 70, 4, 80)[..., 5:75]
    inputs = {k: v.requires_grad_() for k, v in inputs.items()}
    for ours, expected in zip(results(ssd, inputs, "cpu"), results(ssd, inputs, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("threads", (1, 2))
def test_threads_do_not_change_results(threads):
    inputs = {k: v.detach().requires_grad_() for k, v in make_inputs(L=70, P=70, dtype=torch.float32).items()}
    expected, before = results(ssd, inputs, "cpu"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(results(ssd, inputs, "cpu"), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("L", (1, 37))
def test_non_causal_equals_the_sum(L):
    inputs = make_nc_inputs(L=L)
    torch.testing.assert_close(results(nc_ssd, inputs, None), results(nc_ssd, inputs, "reference"))


def test_ssd_is_a_selective_scan_with_one_decay_a_head():
    i = make_inputs(G=4)
    x, H, P, N = i["x"], 4, 3, 5
    y = selective_scan(
        x,
        i["dt"].unsqueeze(-1).expand(-1, -1, -1, P),
        i["A"][:, None, None].expand(H, P, N),
        i["B"],
        i["C"],
        i["D"][:, None].expand(H, P),
        dt_softplus=False,
    )
    torch.testing.assert_close(ssd(**i), y)


def test_non_causal_is_order_free():
    inputs = make_nc_inputs()
    order = torch.randperm(37)
    shuffled = {k: (v if k == "D" else v[:, order]) for k, v in inputs.items()}
    torch.testing.assert_close(nc_ssd(**shuffled), nc_ssd(**inputs)[:, order])


def test_gradcheck():
    inputs = make_inputs(B=1, L=6, H=2, P=2, G=1, N=2)
    assert gradcheck(lambda *a: ssd(*a, chunk_size=4), tuple(inputs.values()))
    inputs = make_nc_inputs(B=1, L=6, H=2, P=2, N=2)
    assert gradcheck(nc_ssd, tuple(v.detach().requires_grad_() for v in inputs.values()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_keeps_its_states_in_float32(dtype):
    for op, inputs in ((ssd, make_inputs(L=200)), (nc_ssd, make_nc_inputs(L=200))):
        low = {k: v.detach().to(dtype) for k, v in inputs.items()}
        y, exact = op(**low), op(**{k: v.double() for k, v in low.items()})
        assert y.dtype == dtype
        assert (y - exact).abs().max() <= 2 * torch.finfo(dtype).eps * max(exact.abs().max(), 1) + 1e-4


def test_long_decays_neither_overflow_nor_turn_nan():
    inputs = {k: v.detach() for k, v in make_inputs(L=300, dtype=torch.float32).items()}
    inputs["dt"] = inputs["dt"] * 50
    for value in results(ssd, {k: v.requires_grad_() for k, v in inputs.items()}, None):
        assert value.isfinite().all()


def test_compile():
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    inputs = make_inputs()
    torch.testing.assert_close(compiled(**inputs), ssd(**inputs))


@pytest.mark.parametrize("save", (False, True))
def test_operator(save):
    C, B, x = torch.randn(2, 9, 2, 5), torch.randn(2, 9, 2, 5), torch.randn(2, 9, 4, 3)
    dt, initial = torch.rand(2, 9, 4), torch.randn(2, 4, 5, 3)
    inputs = [t.requires_grad_() for t in (C, B, x, -dt, dt, initial)]
    torch.library.opcheck(torch.ops.linzoo.ssd.default, (*inputs, 4, save))


def test_bad_arguments():
    i = make_inputs()
    with pytest.raises(ValueError, match=r"dt: expected \(B, L, H\) = \(2, 37, 4\), got \(2, 36, 4\)"):
        ssd(**{**i, "dt": i["dt"][:, 1:]})
    with pytest.raises(ValueError, match=r"x: expected \(B, L, H, P\), got \(37, 4, 3\)"):
        ssd(**{**i, "x": i["x"][0]})
    with pytest.raises(ValueError, match="B: the number of heads, 4, must be a multiple of its groups, got 3"):
        ssd(**{**i, **{k: torch.zeros(2, 37, 3, 5) for k in "BC"}})
    with pytest.raises(ValueError, match="chunk_size: .* got 0"):
        ssd(**i, chunk_size=0)
    with pytest.raises(ValueError, match="weight: expected"):
        nc_ssd(**{**make_nc_inputs(), "weight": i["dt"][..., :1]})


def test_gradient_of_the_rates_keeps_its_digits():
    """One sum over everything, whose terms cancel: no more is lost than by the recurrence."""
    lost = {None: [], "reference": []}
    for seed in range(20):
        torch.manual_seed(seed)
        x = dict(x=torch.randn(2, 130, 1, 4), dt=torch.rand(2, 130, 1), A=-torch.rand(1) - 0.1)
        x |= {name: torch.randn(2, 130, 1, 4) for name in "BC"}
        g, exact = torch.randn(2, 130, 1, 4), None
        for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), (None, torch.float32)):
            leaves = {name: t.to(dtype).requires_grad_() for name, t in x.items()}
            with use_backend(backend):
                dA = torch.autograd.grad(ssd(**leaves), leaves["A"], g.to(dtype))[0].double()
            if dtype == torch.float64:
                exact = dA
            else:
                lost[backend].append(((dA - exact).abs() / exact.abs()).item())
    medians = {backend: sorted(errors)[10] for backend, errors in lost.items()}
    assert medians[None] < 2 * medians["reference"] < 2e-6
