"""bi_wkv, wkv6 and wkv7: the equations written out, published values, the CPU kernels against the reference."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from linzoo.ops import bi_wkv, scan_order, use_backend, wkv6, wkv7

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest error over the largest magnitude: a few roundings of the dtype, or of the float32 sums.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPS = {"bi_wkv": bi_wkv, "wkv6": wkv6, "wkv7": wkv7}


def make_inputs(name, B=2, L=35, C=24, H=2, N=8, P=12, dtype=torch.float64):
    """Leaves of an operator's inputs: C channels, or H heads of N key and P value channels."""
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    if name == "bi_wkv":
        inputs = dict(k=normal(B, L, C), v=normal(B, L, C), w=normal(C) / 5, u=normal(C))
    else:
        heads = {key: normal(B, L, H, N) for key in "rkwab"}
        if name == "wkv6":
            inputs = dict(r=heads["r"], k=heads["k"], v=normal(B, L, H, P), w=heads["w"] - 2, u=normal(H, N))
        else:
            kappa = torch.nn.functional.normalize(heads["a"], dim=-1)
            inputs = dict(r=heads["r"], w=heads["w"] - 2, k=heads["k"], v=normal(B, L, H, P))
            inputs |= dict(a=-kappa, b=kappa * heads["b"].sigmoid())
    return {key: x.to(dtype).requires_grad_() for key, x in inputs.items()}


def outputs_and_gradients(name, inputs, backend, **options):
    with use_backend(backend):
        y = OPS[name](**inputs, **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
        return dict(zip(["y", *inputs], [y, *torch.autograd.grad(y, list(inputs.values()), dy)], strict=True))


def assert_backends_agree(name, inputs, **options):
    ours = outputs_and_gradients(name, inputs, "cpu", **options)
    for key, expected in outputs_and_gradients(name, inputs, "reference", **options).items():
        got = ours[key]
        assert got.dtype == expected.dtype and got.shape == expected.shape, key
        if expected.numel():
            scale = expected.double().abs().max().clamp(min=1e-2)
            error = ((got.double() - expected.double()).abs().max() / scale).item()
            assert error <= TOLERANCE[expected.dtype], f"{key}: {error:.1e}"  # NaN fails, too


# --- the equations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (0.2, 3.0))
def test_reference_of_bi_wkv_is_the_equation(scale):
    inputs = make_inputs("bi_wkv", L=9, C=3)
    k, v, w, u = inputs["k"], inputs["v"], inputs["w"] * scale, inputs["u"]
    order = torch.stack([torch.randperm(9)[:7] for _ in range(2)])
    with use_backend("reference"):
        y = bi_wkv(k, v, w, u, order=order)
    for b in range(2):
        tokens = order[b]
        for t in range(7):
            distance = (torch.arange(7) - t).abs().unsqueeze(1) - 1
            exponent = torch.where(distance < 0, u + k[b, tokens], k[b, tokens] - distance * w)
            weight = exponent.softmax(0)
            torch.testing.assert_close(y[b, tokens[t]], (weight * v[b, tokens]).sum(0))


@pytest.mark.parametrize("bidirectional", (False, True))
def test_reference_of_wkv6_is_the_equation(bidirectional):
    """Each token's weight for a step: r k times the decays of the tokens strictly between."""
    inputs = make_inputs("wkv6", B=1, L=6, H=1, N=3, P=2)
    r, k, v, w, u = (inputs[key].squeeze() for key in "rkvwu")
    with use_backend("reference"):
        y = wkv6(**inputs, bidirectional=bidirectional)[0, :, 0]
    decay = torch.exp(-torch.exp(w))
    for t in range(6):
        expected = (r[t] * u * k[t]).sum() * v[t]
        for i in range(6 if bidirectional else t):
            if i != t:
                between = decay[min(i, t) + 1 : max(i, t)].prod(0)
                expected = expected + (r[t] * k[i] * between).sum() * v[i]
        torch.testing.assert_close(y[t], expected)


def test_reference_of_wkv7_is_the_equation():
    inputs = make_inputs("wkv7", B=1, L=5, H=1, N=3, P=2)
    r, w, k, v, a, b = (inputs[key].squeeze() for key in "rwkvab")
    with use_backend("reference"):
        y = wkv7(**inputs)[0, :, 0]
    S = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(5):
        S = S @ (torch.diag(torch.exp(-torch.exp(w[t]))) + torch.outer(a[t], b[t])) + torch.outer(v[t], k[t])
        torch.testing.assert_close(y[t], S @ r[t])


def test_wkv7_writes_what_it_reads():
    """Without decay and with learning rate 1 the state gives back the last value stored under a unit key."""
    kappa = torch.nn.functional.normalize(torch.randn(1, 8, 1, 4, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 8, 1, 3, dtype=torch.float64)
    y = wkv7(kappa, torch.full_like(kappa, -torch.inf), kappa, v, -kappa, kappa)
    torch.testing.assert_close(y, v)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", ("op_biwkv", "op_wkv6_bidirectional"))
def test_parity(name, backend):
    """Outputs and gradients of the published operators."""
    case = json.loads((PARITY / "ops" / f"{name}.json").read_text())
    tensors = [torch.from_numpy(synth.image(i["shape"], i["seed"])).double() for i in case["inputs"]]
    *tensors, dy = tensors
    if name == "op_biwkv":
        decay, first, k, v = tensors
        leaves = dict(k=k, v=v, w=3 * decay / 97, u=first / 97)
    else:
        r, k, v, x, u = tensors
        leaves = {key: t.unflatten(-1, (2, 32)) for key, t in dict(r=r, k=k, v=v, w=x - 2).items()} | {"u": u}
        dy = dy.unflatten(-1, (2, 32))
    leaves = {key: t.clone().requires_grad_() for key, t in leaves.items()}
    with use_backend(backend):
        y = (bi_wkv if name == "op_biwkv" else wkv6)(**leaves)
        grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    ours = {"y": y} | {f"grad_{key}": g for key, g in grads.items()}
    checked = set()
    for out in case["outputs"]:
        if out["name"] not in ours:
            continue
        got = ours[out["name"]].detach().reshape(out["shape"]).flatten()
        got = got if out["index"] == "all" else got[out["index"]]
        assert (got - torch.tensor(out["value"], dtype=torch.float64)).abs().max() <= 1e-6 * max(out["std"], 1)
        checked.add(out["name"])
    assert checked == set(ours)


def authors_kernel(k, v, w, u, chunks=32):
    """What the CUDA kernel of the published models computes: see the docstring of `bi_wkv`."""
    T = k.shape[1]
    length = -(-T // chunks)
    t, i = torch.arange(T)[:, None, None], torch.arange(T)[None, :, None]
    distance, start = (t - i).abs(), t // length * length
    same_chunk = (i >= start) & (i < t)
    weights = torch.exp(torch.where(t == i, u + k[:, None], k[:, None] - (distance - same_chunk.long()) * w))
    stale = (i > start) & (i <= t)  # is subtracted from what lies ahead, and not quite taken away
    weights = weights + stale * (1 - torch.exp(w)) * torch.exp(k[:, None] + (t - i) * w)
    return torch.einsum("btic,bic->btc", weights, v) / weights.sum(2)


def departure(T, scale=1.0, C=192):
    """Largest error of the authors' kernel over the outputs' standard deviation, for decays of N(0, scale) / T."""
    k, v = (torch.randn(2, T, C, dtype=torch.float64) for _ in range(2))
    w, u = (torch.randn(C, dtype=torch.float64) for _ in range(2))
    y = bi_wkv(k, v, scale * w, u, divide_by_length=True)
    return ((authors_kernel(k, v, scale * w / T, u / T) - y).abs().max() / y.std()).item()


def test_how_the_authors_kernel_departs_from_the_equation():
    """The published values confirm what it computes, and the docstring says by how much that differs."""
    case = json.loads((PARITY / "ops/op_biwkv.json").read_text())
    decay, first, k, v, _ = (torch.from_numpy(synth.image(i["shape"], i["seed"])).double() for i in case["inputs"])
    for out in case["outputs"]:
        if out["name"] in ("y_cuda32", "y_cuda64"):
            got = authors_kernel(k, v, 3 * decay / 97, first / 97, int(out["name"][-2:]))
            assert (got.flatten() - torch.tensor(out["value"])).abs().max() <= 1e-5
    assert departure(64, scale=0.0) < 1e-12
    assert 0.002 < departure(196) < 0.02
    assert 0.03 < departure(20) < 0.3


def test_re_wkv_is_an_order_and_no_transposition():
    """Restore-RWKV's second pass walks the columns; so does a transposed map."""
    inputs, (H, W) = make_inputs("bi_wkv", L=35), (5, 7)
    k, v, w, u = inputs.values()
    turned = [x.unflatten(1, (H, W)).transpose(1, 2).flatten(1, 2) for x in (k, v)]
    expected = bi_wkv(*turned, w, u).unflatten(1, (W, H)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(bi_wkv(k, v, w, u, order=scan_order.column(H, W)), expected)


def test_divide_by_length():
    inputs = make_inputs("bi_wkv")
    k, v, w, u = inputs.values()
    torch.testing.assert_close(bi_wkv(k, v, w, u, divide_by_length=True), bi_wkv(k, v, w / 35, u / 35))
    order = torch.arange(7)
    torch.testing.assert_close(
        bi_wkv(k, v, w, u, order=order, divide_by_length=True), bi_wkv(k, v, w / 7, u / 7, order=order)
    )


def test_bi_wkv_is_a_mean():
    """Outputs lie between the values; a constant on all keys changes nothing; a single token gives its value."""
    inputs = make_inputs("bi_wkv")
    y = bi_wkv(**inputs)
    assert (y <= inputs["v"].amax(1, keepdim=True)).all() and (y >= inputs["v"].amin(1, keepdim=True)).all()
    torch.testing.assert_close(bi_wkv(**{**inputs, "k": inputs["k"] + 100}), y)
    (dk,) = torch.autograd.grad(y.square().sum(), inputs["k"])
    torch.testing.assert_close(dk.sum(1), torch.zeros_like(dk[:, 0]))
    one = make_inputs("bi_wkv", L=1)
    torch.testing.assert_close(bi_wkv(**one), one["v"])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("decay", (-40.0, -1.0, 0.0, 1.0, 40.0))
def test_bi_wkv_is_stable_for_any_decay(decay, backend):
    """Large keys and decays overflow nothing: float32 follows float64, forward and backward."""
    exact = make_inputs("bi_wkv", L=300, C=5)
    with torch.no_grad():
        exact["k"] *= 30
        exact["u"] *= 30
        exact["w"].fill_(decay)
    low = {key: x.detach().float().requires_grad_() for key, x in exact.items()}
    expected, got = (outputs_and_gradients("bi_wkv", x, backend) for x in (exact, low))
    for key in ("y", "k", "v", "u", "w"):
        scale = expected[key].abs().max().clamp(min=1)
        assert (got[key] - expected[key]).abs().max() <= 1e-2 * scale, key
    assert (got["y"] - expected["y"]).abs().max() <= 1e-3


def test_wkv6_decays_at_both_ends():
    """Decays that vanish or never begin stay finite, and so do their gradients."""
    inputs = make_inputs("wkv6", dtype=torch.float32)
    with torch.no_grad():
        inputs["w"][:, ::2] = 200.0
        inputs["w"][:, 1::2] = -200.0
    for backend in ("cpu", "reference"):
        results = outputs_and_gradients("wkv6", inputs, backend)
        assert all(x.isfinite().all() for x in results.values())
    assert_backends_agree("wkv6", inputs)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_rounding_does_not_add_up_over_the_steps(backend):
    """In float32, long sequences of slowly decaying weights stay as near to the exact values as short ones."""
    k, v, w, u = (t.detach() for t in make_inputs("bi_wkv", B=1, L=2048).values())
    exact = bi_wkv(3 * k, v, w, u, divide_by_length=True)
    with use_backend(backend):
        y = bi_wkv(*(t.float() for t in (3 * k, v, w, u)), divide_by_length=True)
    assert (y - exact).abs().max() <= 3e-5 * exact.std()


# --- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (1, 16, 23, 40))
def test_bi_wkv_equals_reference(dtype, C):
    assert_backends_agree("bi_wkv", make_inputs("bi_wkv", C=C, dtype=dtype), order=scan_order.column(5, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "P"), ((1, 1), (8, 16), (5, 19), (33, 40)))
@pytest.mark.parametrize("name", ("wkv6", "wkv7"))
def test_matrix_states_equal_reference(name, dtype, N, P):
    assert_backends_agree(name, make_inputs(name, N=N, P=P, dtype=dtype), order=scan_order.snake(5, 7))


@pytest.mark.parametrize("L", (1, 2, 31, 32, 33, 65))
@pytest.mark.parametrize("name", OPS)
def test_lengths(name, L):
    assert_backends_agree(name, make_inputs(name, L=L, dtype=torch.float32))


def test_one_direction():
    assert_backends_agree("wkv6", make_inputs("wkv6", dtype=torch.float32), bidirectional=False)


@pytest.mark.parametrize("batch", (0, 1, 3))
@pytest.mark.parametrize("name", OPS)
def test_batches(name, batch):
    assert_backends_agree(name, make_inputs(name, B=batch, dtype=torch.float32))


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("name", OPS)
def test_partial_orders(name, index_dtype):
    """Tokens that no step visits give 0 and receive no gradient; items may have orders of their own."""
    inputs = make_inputs(name, L=40, dtype=torch.float32)
    order = torch.stack([torch.randperm(40)[:33] for _ in range(2)]).to(index_dtype)
    assert_backends_agree(name, inputs, order=order)
    results = outputs_and_gradients(name, inputs, "cpu", order=order)
    visited = torch.zeros(2, 40, dtype=torch.bool).scatter_(1, order.long(), True)
    for key, x in results.items():
        if x.dim() > 2:
            assert (x[~visited] == 0).all() and (x[visited] != 0).any(), key
    torch.testing.assert_close(
        results["y"][1:], OPS[name](**{k: v[1:] if v.dim() > 2 else v for k, v in inputs.items()}, order=order[1])
    )


@pytest.mark.parametrize("name", OPS)
def test_non_contiguous_views(name):
    inputs = make_inputs(name, dtype=torch.float32)
    views = {}
    for i, (key, x) in enumerate(inputs.items()):
        x = x.detach()
        if x.dim() == 1:
            view = torch.stack([x, x], -1)[:, 0]
        elif i % 2:
            view = x.transpose(0, -1).contiguous().transpose(0, -1)
        else:
            view = torch.cat([x, x], -1).tensor_split(2, -1)[1]
        assert not view.is_contiguous()
        views[key] = view.detach().requires_grad_()
    assert_backends_agree(name, views)


@pytest.mark.parametrize("name", OPS)
def test_gradients_that_arrive_as_views(name):
    inputs = make_inputs(name, dtype=torch.float32)
    y = OPS[name](**inputs)
    dense = torch.autograd.grad(y, inputs["v"], torch.ones_like(y), retain_graph=True)
    torch.testing.assert_close(dense, torch.autograd.grad(y.sum(), inputs["v"]), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name, backend):
    inputs = make_inputs(name, B=2, L=6, C=3, H=2, N=3, P=2)
    order = scan_order.column(2, 3)

    def run(*tensors):
        return OPS[name](**dict(zip(inputs, tensors, strict=True)), order=order)

    with use_backend(backend):
        assert gradcheck(run, tuple(inputs.values()))


def raw(name, save, order=None):
    """Arguments of the registered operator of that name."""
    inputs = make_inputs(name, B=2, L=6, C=3, H=2, N=3, P=2, dtype=torch.float32)
    options = (order, True, save) if name == "wkv6" else (order, save)
    return [inputs[key] for key in {"bi_wkv": "kvwu", "wkv6": "rkvwu", "wkv7": "rwkvab"}[name]], options


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("save", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend, save):
    forward, backward = (getattr(torch.ops.linzoo, n).default for n in (name, f"{name}_backward"))
    with use_backend(backend):
        tensors, options = raw(name, save, scan_order.column(2, 3))
        torch.library.opcheck(forward, (*tensors, *options))
        with torch.no_grad():
            y, saved = forward(*tensors, *options)
        tensors = [x.detach() for x in (y, *tensors)]
        extra = (y, saved) if name == "bi_wkv" else (saved,)
        torch.library.opcheck(backward, (*tensors, *options[:-1], *extra))


@pytest.mark.parametrize("name", OPS)
def test_gradients_without_what_the_forward_pass_keeps(name):
    grads = []
    tensors, _ = raw(name, True)
    for save in (False, True):
        y, saved = getattr(torch.ops.linzoo, name)(*tensors, *raw(name, save)[1])
        assert (saved.numel() > 0) == save
        grads.append(torch.autograd.grad(y.square().sum(), tensors))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_compile(name, dynamic):
    inputs, order = make_inputs(name, dtype=torch.float32), scan_order.column(5, 7)

    def run(inputs, order):
        return OPS[name](**inputs, order=order).square()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager = run(inputs, order)
    torch.testing.assert_close(compiled(inputs, order), eager)
    got = torch.autograd.grad(compiled(inputs, order).sum(), list(inputs.values()))
    torch.testing.assert_close(got, torch.autograd.grad(eager.sum(), list(inputs.values())))


class Program(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, inputs):
        steps = torch.arange(inputs["k"].shape[1])
        return OPS[self.name](**inputs, order=steps.flip(0))


@pytest.mark.parametrize("name", OPS)
def test_export_keeps_the_operator(name):
    """One program serves any length."""
    length = torch.export.Dim("length", min=2, max=4096)
    model, inputs = Program(name), {key: x.detach() for key, x in make_inputs(name, dtype=torch.float32).items()}
    shapes = {key: {1: length} if x.dim() > 2 else None for key, x in inputs.items()}
    program = torch.export.export(model, (inputs,), dynamic_shapes=(shapes,))
    target = getattr(torch.ops.linzoo, name).default
    assert any(node.target is target for node in program.graph.nodes)
    for L in (3, 70):
        xs = {key: x.detach() for key, x in make_inputs(name, L=L, dtype=torch.float32).items()}
        torch.testing.assert_close(program.module()(xs), model(xs), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_export_backend_equals_the_kernel(name):
    inputs = make_inputs(name, dtype=torch.float32)
    expected = OPS[name](**inputs, order=scan_order.column(5, 7))
    with use_backend("export"), torch.no_grad():
        torch.testing.assert_close(OPS[name](**inputs, order=scan_order.column(5, 7)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_onnx_has_one_scan_a_direction(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    length = torch.export.Dim("length", min=2, max=4096)
    model, inputs = Program(name), {key: x.detach() for key, x in make_inputs(name, dtype=torch.float32).items()}
    shapes = {key: {1: length} if x.dim() > 2 else None for key, x in inputs.items()}
    with use_backend("export"), torch.no_grad():
        program = torch.onnx.export(model, (inputs, {}), dynamic_shapes=(shapes,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph].count("Scan") == (1 if name == "wkv7" else 2)
    path = tmp_path / "scan.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for L in (35, 61):
        xs = {key: x.detach() for key, x in make_inputs(name, L=L, dtype=torch.float32).items()}
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), xs.values(), strict=True)}
        got = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(got, model(xs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", OPS)
def test_autocast(name, dtype):
    """Mixed activations are promoted, parameters keep their precision, and the float32 result is near."""
    inputs = make_inputs(name, dtype=torch.float32)
    low = {key: x.to(dtype) if x.dim() > 2 else x for key, x in inputs.items()}
    with torch.autocast("cpu", dtype=dtype):
        mixed, all_low = OPS[name](**{**low, "v": inputs["v"]}), OPS[name](**low)
    assert mixed.dtype == torch.float32 and all_low.dtype == dtype
    exact = OPS[name](**inputs)
    for got in (mixed, all_low.float()):
        assert (got - exact).abs().max() <= 0.05 * exact.abs().max()
    all_low.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs.values())


@pytest.mark.parametrize("name", OPS)
def test_results_do_not_depend_on_threads(name):
    inputs = make_inputs(name, B=3, L=63, C=87, H=3, N=19, P=37, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(name, inputs, "cpu", order=scan_order.column(7, 9)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", OPS)
def test_nan_shows_where_it_spreads(name):
    inputs = make_inputs(name, dtype=torch.float32)
    with torch.no_grad():
        inputs["v"].flatten()[0] = float("nan")  # the first token's first channel
        bad = OPS[name](**inputs).isnan()
    assert bad[0].flatten(1)[1:, 0].all()
    assert bad.sum() == bad[0].flatten(1)[:, 0].sum()


@pytest.mark.parametrize("name", OPS)
def test_flops(name):
    inputs = {key: x.detach().to("meta").requires_grad_() for key, x in make_inputs(name, dtype=torch.float32).items()}
    per_step = {"bi_wkv": 13 * 24, "wkv6": 7 * 2 * 8 * 12, "wkv7": 5 * 2 * 8 * 12}[name]
    with FlopCounterMode(display=False) as forward:
        y = OPS[name](**inputs)
    assert y.shape == inputs["v"].shape
    assert forward.get_total_flops() == 2 * 35 * per_step
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    with FlopCounterMode(display=False) as partial:
        OPS[name](**inputs, order=torch.zeros(7, dtype=torch.int32, device="meta"))
    assert partial.get_total_flops() == 2 * 7 * per_step


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in OPS for key in make_inputs(name)])
def test_wrong_shapes_name_the_argument(name, key):
    inputs = make_inputs(name)
    with pytest.raises(ValueError, match=rf"{key}.*: expected .* got \("):
        OPS[name](**{**inputs, key: inputs[key][..., 0]})
    if key != next(iter(inputs)):
        with pytest.raises(ValueError, match=rf"^{key}: expected .* got \("):
            OPS[name](**{**inputs, key: inputs[key][:-1]})


@pytest.mark.parametrize("name", OPS)
def test_wrong_types_and_devices(name):
    inputs = make_inputs(name)
    with pytest.raises(TypeError, match="^v: .*int32"):
        OPS[name](**{**inputs, "v": inputs["v"].detach().int()})
    with pytest.raises(ValueError, match="^v: expected on cpu as ., got meta"):
        OPS[name](**{**inputs, "v": inputs["v"].to("meta")})
    with pytest.raises(TypeError, match="^order: .*float32"):
        OPS[name](**inputs, order=torch.zeros(35))
    with pytest.raises(ValueError, match="must be positive"):
        OPS[name](**make_inputs(name, L=0))


@pytest.mark.parametrize("shape", ((36,), (0,), (3, 35), (1, 2, 35)))
@pytest.mark.parametrize("name", OPS)
def test_wrong_order_shapes(name, shape):
    with pytest.raises(ValueError, match="^order: expected"):
        OPS[name](**make_inputs(name), order=torch.zeros(shape, dtype=torch.int32))


@pytest.mark.parametrize("entry", (-1, 35))
@pytest.mark.parametrize("name", OPS)
def test_order_out_of_range(name, entry):
    order = scan_order.raster(5, 7)
    order[3] = entry
    with pytest.raises(RuntimeError, match=rf"order: .*\[0, 35\), got {entry}"):
        OPS[name](**make_inputs(name), order=order)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("name", OPS)
def test_debug_checks_find_repeated_tokens(name, backend, monkeypatch):
    order = scan_order.raster(5, 7)
    order[3] = order[4]
    with use_backend(backend):
        monkeypatch.setenv("LINZOO_DEBUG", "1")
        with pytest.raises(RuntimeError, match="order: a group visits a token twice"):
            OPS[name](**make_inputs(name), order=order)
        OPS[name](**make_inputs(name), order=scan_order.raster(5, 7))


def test_gradient_of_the_decay_keeps_its_digits():
    """One sum over everything, whose terms cancel: no more is lost than where autograd adds the terms up."""
    lost = {"cpu": [], "reference": []}
    for seed in range(30):
        torch.manual_seed(seed)
        x = {name: torch.randn(2, 196, 1) for name in "kv"} | {name: torch.randn(1) for name in "wu"}
        g, exact = torch.randn(2, 196, 1), None
        for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
            leaves = {name: t.to(dtype).requires_grad_() for name, t in x.items()}
            with use_backend(backend):
                y = bi_wkv(**leaves, divide_by_length=True)
                dw = torch.autograd.grad(y, leaves["w"], g.to(dtype))[0].double()
            if dtype == torch.float64:
                exact = dw
            else:
                lost[backend].append(((dw - exact).abs() / exact.abs()).item())
    medians = {backend: sorted(errors)[15] for backend, errors in lost.items()}
    assert medians["cpu"] < 4 * medians["reference"] < 1e-5
