"""selective_scan: the CPU kernel against the reference, and the reference against the recurrence written out."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from linzoo.ops import scan_order, selective_scan, selective_scan_state, selective_states, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest error over the largest magnitude: a few roundings of the output's (or, for float32 sums, the sum's) dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_inputs(B=2, L=35, G=4, D=8, N=2, R=None, dtype=torch.float64, skip=True, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = dict(
        u=normal(B, L, G, D),
        dt=normal(B, L, G, R or D),
        A=-0.1 - 8 * torch.rand(G, D, N, generator=generator, dtype=torch.float64),
        B=normal(B, L, G, N),
        C=normal(B, L, G, N),
    )
    if skip:
        inputs["D"] = normal(G, D)
    if R:
        inputs["dt_weight"] = normal(G, D, R) / R**0.5
    if bias:
        inputs["dt_bias"] = normal(G, D) - 3
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def outputs_and_gradients(inputs, backend, **options):
    with use_backend(backend):
        y = selective_scan(**inputs, **options)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return dict(zip(["y", *inputs], [y, *grads], strict=True))


def assert_backends_agree(inputs, **options):
    ours = outputs_and_gradients(inputs, "cpu", **options)
    reference = outputs_and_gradients(inputs, "reference", **options)
    for name, expected in reference.items():
        got = ours[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        if expected.numel():
            scale = expected.double().abs().max().clamp(min=1e-3)
            error = ((got.double() - expected.double()).abs().max() / scale).item()
            assert error <= TOLERANCE[expected.dtype], f"{name}: {error:.1e}"  # NaN fails, too


def test_reference_is_the_recurrence():
    inputs = make_inputs(B=2, L=7, G=2, D=3, N=2, R=2)
    order = torch.stack([torch.randperm(7), torch.randperm(7)])
    with use_backend("reference"):
        y = selective_scan(**inputs, order=order)
    u, dt, A, Bm, C, D, weight, bias = (inputs[k] for k in ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias"))
    for b, g, d in itertools.product(range(2), range(2), range(3)):
        h = torch.zeros(2, dtype=torch.float64)
        for t in range(7):
            l = order[g, t]
            delta = torch.log1p(torch.exp(weight[g, d] @ dt[b, l, g] + bias[g, d]))
            h = torch.exp(delta * A[g, d]) * h + delta * Bm[b, l, g] * u[b, l, g, d]
            torch.testing.assert_close(y[b, l, g, d], C[b, l, g] @ h + D[g, d] * u[b, l, g, d])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (1, 3, 87, 100))
@pytest.mark.parametrize("N", (1, 2, 16))
def test_cpu_equals_reference(dtype, D, N):
    order = scan_order.cross(5, 7)
    assert_backends_agree(make_inputs(D=D, N=N, R=-(-D // 16), dtype=dtype), order=order)


@pytest.mark.parametrize("L", (1, 2, 31, 32, 33, 65))
@pytest.mark.parametrize("merge", (False, True))
def test_lengths(L, merge):
    assert_backends_agree(make_inputs(L=L, D=20, N=5, dtype=torch.float32), merge=merge)


@pytest.mark.parametrize("skip", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("rank", (None, 3))
def test_optional_parts(skip, bias, rank):
    assert_backends_agree(make_inputs(R=rank, skip=skip, bias=bias, dtype=torch.float32))


def test_without_softplus():
    inputs = make_inputs(dtype=torch.float32)
    inputs["dt"] = inputs["dt"].detach().abs().requires_grad_()
    del inputs["dt_bias"]
    assert_backends_agree(inputs, dt_softplus=False)


@pytest.mark.parametrize(("dtype", "scale"), ((torch.float32, 30), (torch.float64, 5)))
def test_large_and_tiny_steps(dtype, scale):
    """Softplus is linear for large steps and exponential for small ones; the decay underflows to 0.

    float64 stays below 20, where PyTorch's softplus drops a term of 2e-9 that the kernel keeps.
    """
    inputs = make_inputs(dtype=dtype)
    inputs["dt"] = (inputs["dt"].detach() * scale).requires_grad_()
    assert_backends_agree(inputs)


@pytest.mark.parametrize("batch", (0, 1, 3))
def test_batches(batch):
    assert_backends_agree(make_inputs(B=batch, dtype=torch.float32), order=scan_order.cross(7, 5))


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("merge", (False, True))
def test_partial_orders(index_dtype, merge):
    """Tokens that no step visits give 0 and receive no gradient."""
    inputs = make_inputs(L=36, dtype=torch.float32, R=2)
    order = scan_order.atrous(6, 6, 2).to(index_dtype)
    assert_backends_agree(inputs, order=order, merge=merge)
    results = outputs_and_gradients(inputs, "cpu", order=order)
    visited = torch.zeros(36, 4, dtype=torch.bool)
    visited.scatter_(0, order.long().t(), True)
    for name in ("y", "u", "dt", "B", "C"):
        assert (results[name][:, ~visited] == 0).all(), name


def test_order_per_batch_item():
    order = torch.stack([torch.stack([torch.randperm(35)[:20] for _ in range(4)]) for _ in range(2)])
    inputs = make_inputs(dtype=torch.float32)
    assert_backends_agree(inputs, order=order)
    both = outputs_and_gradients(inputs, "cpu", order=order)["y"]
    second = {k: (v[1:] if k in ("u", "dt", "B", "C") else v) for k, v in inputs.items()}
    torch.testing.assert_close(both[1:], selective_scan(**second, order=order[1]))


def test_merge_is_the_sum_over_groups():
    inputs, order = make_inputs(dtype=torch.float32), scan_order.cross(5, 7)
    torch.testing.assert_close(
        selective_scan(**inputs, order=order, merge=True), selective_scan(**inputs, order=order).sum(2)
    )


def test_groups_that_share_channels():
    """VMamba: the four groups read one tensor through a stride-0 view."""
    inputs = make_inputs(D=24, R=2, dtype=torch.float32)
    x = inputs["u"].detach()[:, :, :1].clone().requires_grad_()
    results = {}
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            y = selective_scan(
                x.expand(-1, -1, 4, -1), *list(inputs.values())[1:5], inputs["D"], dt_weight=inputs["dt_weight"]
            )
        results[backend] = y, torch.autograd.grad(y.square().sum(), x)[0]
    for ours, reference in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ("cpu", "reference", "export", "export_chunked"))
@pytest.mark.parametrize("merge", (False, True))
def test_one_group_of_inputs_is_read_by_all(backend, merge):
    """As its expand is, in values and gradients."""
    inputs = make_inputs(D=8, N=1, R=2, dtype=torch.float32)
    inputs["u"] = inputs["u"].detach()[:, :, :1].clone().requires_grad_()
    order = scan_order.cross(5, 7)[:, :30]
    with use_backend(backend):
        results = [selective_scan(**inputs | dict(u=u), order=order, merge=merge)
                   for u in (inputs["u"], inputs["u"].expand(-1, -1, 4, -1))]  # fmt: skip
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), list(inputs.values())) for y in results))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", (3, 5))
@pytest.mark.parametrize("steps", (20, 35))
def test_gradient_of_inputs_that_groups_share(dtype, batch, steps):
    """Added up over groups by the kernel in large batches, by PyTorch in small ones."""
    inputs = make_inputs(B=batch, D=87, R=2, dtype=dtype)
    inputs["u"] = inputs["u"].detach()[:, :, :1].clone().requires_grad_()
    assert_backends_agree(inputs, order=scan_order.cross(5, 7)[:, :steps], merge=True)


def test_one_group_of_inputs_without_a_kernel():
    inputs = make_inputs(L=6, D=3, R=2)
    inputs["u"] = inputs["u"].detach()[:, :, :1].clone().requires_grad_()
    names = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")
    torch.library.opcheck(
        torch.ops.linzoo.selective_scan.default, (*(inputs[k] for k in names), True, None, True, True)
    )
    assert gradcheck(lambda *x: selective_scan(**dict(zip(inputs, x, strict=True))), tuple(inputs.values()))
    meta = {k: v.detach().to("meta") for k, v in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        assert selective_scan(**meta).shape == (2, 6, 4, 3)
    assert counter.get_total_flops() == 2 * 6 * 4 * 3 * (9 * 2 + 1 + 2)

    state = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    wide = inputs | dict(u=inputs["u"].expand(-1, -1, 4, -1))
    for initial in (None, state):
        results = [selective_scan_state(**x, initial=initial) for x in (inputs, wide)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("merge", (False, True))
def test_non_contiguous_views(merge):
    """Channel splits, strided tokens, projections split from one tensor, strided last dimensions."""
    base = make_inputs(B=2, L=70, D=20, N=3, R=2, dtype=torch.float32)
    leaf = {k: v.detach() for k, v in base.items()}
    views = dict(leaf)
    views["u"] = leaf["u"].reshape(2, 70, 80)[:, ::2].unflatten(-1, (4, 20))
    projected = torch.cat([leaf[k] for k in ("dt", "B", "C")], -1)[:, 1::2]
    views["dt"], views["B"], views["C"] = projected.split([2, 3, 3], -1)
    views["C"] = views["C"].transpose(2, 3).contiguous().transpose(2, 3)
    views["A"] = leaf["A"].transpose(1, 2).contiguous().transpose(1, 2)
    views["dt_bias"] = torch.stack([leaf["dt_bias"]] * 2, -1)[..., 0]
    views = {k: v.detach().requires_grad_() for k, v in views.items()}
    assert not all(v.is_contiguous() for v in views.values())
    assert_backends_agree(views, merge=merge, order=scan_order.cross(5, 7))


def test_gradients_that_arrive_as_views():
    inputs = make_inputs(dtype=torch.float32)
    for merge in (False, True):
        y = selective_scan(**inputs, merge=merge)
        dense = torch.autograd.grad(y, inputs["u"], torch.ones_like(y), retain_graph=True)
        expanded = torch.autograd.grad(y.sum(), inputs["u"])
        torch.testing.assert_close(dense, expanded, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("merge", (False, True))
def test_gradcheck(backend, merge):
    inputs = make_inputs(B=2, L=6, G=4, D=3, N=2, R=2)
    order = scan_order.cross(2, 3)

    def scan(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), order=order, merge=merge)

    with use_backend(backend):
        assert gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("save", (False, True))
def test_opcheck(backend, save):
    inputs = make_inputs(B=2, L=6, G=4, D=3, N=2, R=2, dtype=torch.float32)
    names = ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")
    args = [inputs[k] for k in names]
    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.linzoo.selective_scan.default, (*args, True, scan_order.cross(2, 3), False, save)
        )
        y, states = torch.ops.linzoo.selective_scan(*args, True, None, False, save)
        detached = [x.detach() for x in (y, *args)]
        torch.library.opcheck(
            torch.ops.linzoo.selective_scan_backward.default, (*detached, True, None, False, states.detach())
        )


def test_gradients_without_saved_states():
    inputs = make_inputs(dtype=torch.float32)
    args = [inputs.get(k) for k in ("u", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")]
    grads = []
    for save in (False, True):
        y, states = torch.ops.linzoo.selective_scan(*args, True, None, False, save)
        assert states.dim() == (5 if save else 1)
        grads.append(torch.autograd.grad(y.square().sum(), [x for x in args if x is not None]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile(dynamic):
    inputs, order = make_inputs(R=2, dtype=torch.float32), scan_order.cross(5, 7)

    def scan(inputs, order):
        return selective_scan(**inputs, order=order, merge=True).square()

    compiled = torch.compile(scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager = scan(inputs, order)
    torch.testing.assert_close(compiled(inputs, order), eager)
    got = torch.autograd.grad(compiled(inputs, order).sum(), list(inputs.values()))
    torch.testing.assert_close(got, torch.autograd.grad(eager.sum(), list(inputs.values())))


@pytest.mark.slow
def test_compile_inductor():
    inputs, order = make_inputs(R=2, dtype=torch.float32), scan_order.cross(5, 7)

    def scan(u, order):
        rest = {k: v for k, v in inputs.items() if k != "u"}
        return selective_scan(torch.sin(u).expand(-1, -1, 4, -1), **rest, order=order, merge=True) * 2

    u = inputs["u"].detach()[:, :, :1].clone().requires_grad_()
    compiled = torch.compile(scan, fullgraph=True)
    torch.testing.assert_close(compiled(u, order), scan(u, order))
    got, expected = (torch.autograd.grad(f(u, order).sum(), u) for f in (compiled, scan))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    """Mixed activations are promoted, parameters keep their precision, and the float32 result is near."""
    inputs = make_inputs(R=2, dtype=torch.float32)
    low = {k: (v.to(dtype) if k in ("dt", "B", "C") else v) for k, v in inputs.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = selective_scan(**low)
        all_low = selective_scan(**{**low, "u": low["u"].to(dtype)})
    assert y.dtype == torch.float32 and all_low.dtype == dtype
    exact = selective_scan(**inputs)
    for got in (y, all_low.float()):
        assert (got - exact).abs().max() <= 0.05 * exact.abs().max()
    all_low.sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in inputs.values())


@pytest.mark.parametrize(("batch", "groups_of_u"), ((3, 4), (5, 1)))
def test_results_do_not_depend_on_threads(batch, groups_of_u):
    inputs = make_inputs(B=batch, L=63, D=87, N=3, R=6, dtype=torch.float32)
    inputs["u"] = inputs["u"].detach()[:, :, :groups_of_u].clone().requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(inputs, "cpu", order=scan_order.cross(7, 9), merge=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_nan_and_overflow_show():
    inputs = make_inputs(B=1, L=40, D=20, dtype=torch.float32)
    with torch.no_grad():
        inputs["u"][0, 5, 1, 3] = float("nan")
        y = selective_scan(**inputs)
        bad = torch.isnan(y)
    assert bad[0, 5:, 1, 3].all()
    assert bad.sum() == 35


def test_fake_tensors_and_meta():
    inputs = {k: v.to("meta") for k, v in make_inputs(R=2, dtype=torch.float32).items()}
    assert selective_scan(**inputs).shape == (2, 35, 4, 8)
    assert selective_scan(**inputs, merge=True).shape == (2, 35, 8)


@pytest.mark.parametrize(("skip", "rank"), ((False, None), (True, None), (True, 3)))
def test_flops_are_the_fields_count(skip, rank):
    inputs = make_inputs(B=2, L=35, G=4, D=8, N=2, R=rank, skip=skip, dtype=torch.float32)
    per_channel = 9 * 2 + skip + (rank or 0)
    inputs = {k: v.detach().to("meta").requires_grad_() for k, v in inputs.items()}
    with FlopCounterMode(display=False) as forward:
        y = selective_scan(**inputs)
    assert forward.get_total_flops() == 2 * 35 * 4 * 8 * per_channel
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    with FlopCounterMode(display=False) as partial:
        selective_scan(**inputs, order=torch.zeros(4, 7, dtype=torch.int32, device="meta"))
    assert partial.get_total_flops() == 2 * 7 * 4 * 8 * per_channel


def test_selective_states():
    inputs = make_inputs(N=1, R=2, skip=False, dtype=torch.float32)
    C = inputs.pop("C")
    order = scan_order.cross(5, 7)
    h = selective_states(**inputs, order=order)
    torch.testing.assert_close(h * C, selective_scan(**inputs, C=C, order=order))
    with pytest.raises(ValueError, match=r"A: .*\(4, 8, 2\)"):
        selective_states(**{**inputs, "A": inputs["A"].expand(-1, -1, 2)})


BAD_SHAPES = {
    "u": lambda i: i["u"][0],
    "dt": lambda i: i["dt"][..., :1],
    "A": lambda i: i["A"][:2],
    "B": lambda i: i["B"][:, :3],
    "C": lambda i: i["C"][..., :1],
    "D": lambda i: i["D"].t(),
    "dt_weight": lambda i: i["dt_weight"][..., 0],
    "dt_bias": lambda i: i["dt_bias"][0],
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_wrong_shapes_name_the_argument(name):
    inputs = make_inputs(R=2)
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got \("):
        selective_scan(**{**inputs, name: BAD_SHAPES[name](inputs)})


@pytest.mark.parametrize("order", (torch.zeros(3, 35), torch.zeros(4, 36), torch.zeros(4, 0), torch.zeros(3, 4, 35)))
def test_wrong_order_shapes(order):
    with pytest.raises(ValueError, match="^order: expected"):
        selective_scan(**make_inputs(), order=order.int())


def test_length_zero():
    with pytest.raises(ValueError, match="must be positive"):
        selective_scan(**make_inputs(L=0))


def test_wrong_dtypes_and_devices():
    inputs = make_inputs()
    with pytest.raises(TypeError, match="^dt: .*int32"):
        selective_scan(**{**inputs, "dt": inputs["dt"].detach().int()})
    with pytest.raises(TypeError, match="^order: .*float32"):
        selective_scan(**inputs, order=torch.zeros(4, 35))
    with pytest.raises(ValueError, match="^A: expected on cpu as u, got meta"):
        selective_scan(**{**inputs, "A": inputs["A"].to("meta")})


@pytest.mark.parametrize("entry", (-1, 35))
def test_order_out_of_range(entry):
    order = scan_order.cross(5, 7)
    order[2, 3] = entry
    with pytest.raises(RuntimeError, match=rf"order: .*\[0, 35\), got {entry}"):
        selective_scan(**make_inputs(), order=order)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_debug_checks_find_repeated_tokens(monkeypatch, backend):
    order = scan_order.cross(5, 7)
    order[2, 3] = order[2, 4]
    with use_backend(backend):
        selective_scan(**make_inputs(), order=order)
        monkeypatch.setenv("LINZOO_DEBUG", "1")
        with pytest.raises(RuntimeError, match="order: a group visits a token twice"):
            selective_scan(**make_inputs(), order=order)
        selective_scan(**make_inputs(), order=scan_order.cross(5, 7))
