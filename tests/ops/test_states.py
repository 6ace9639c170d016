"""WKV from a state to a state: the authors' values, parts that join, gradients, every backend, bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from linzoo.ops import (
    selective_scan,
    selective_scan_state,
    ssd,
    ssd_state,
    use_backend,
    wkv6,
    wkv6_state,
    wkv7,
    wkv7_state,
)

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "states").glob("*.json"))}
pytestmark = pytest.mark.filterwarnings("ignore:linzoo.ops.* runs on its slow PyTorch reference")


def inputs7(B=2, L=11, H=2, N=4, P=4, dtype=torch.float64, shared=False):
    x = {name: torch.randn(B, L, H, N, dtype=dtype) / 2 for name in ("r", "w", "k", "v", "a", "b")}
    x["v"] = torch.randn(B, L, H, P, dtype=dtype)
    x["initial"] = torch.randn(*(() if shared else (B,)), H, P, N, dtype=dtype)
    return x


def inputs6(**sizes):
    x = inputs7(**sizes)
    return {name: x[name] for name in ("r", "k", "v", "w")} | dict(
        u=torch.randn_like(x["r"][0, 0]), initial=x["initial"]
    )


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    case = CASES[name]
    r, w, k, v, kappa, eta, s0, gy, gs = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"])
    kappa, eta = F.normalize(kappa, dim=-1, eps=1e-12), eta.sigmoid()
    leaves = [r, -0.5 - F.softplus(-w), k, v, -kappa, eta * kappa, 0.3 * s0]
    leaves = [x.detach().requires_grad_() for x in leaves]
    y, state = wkv7_state(*leaves)
    both = torch.autograd.grad([y, state], leaves, [gy, gs], retain_graph=True)
    alone = torch.autograd.grad(y, leaves[-1:], gy)
    found = dict(y=y, final_state=state, grad_s0_of_y_alone=alone[0])
    found |= dict(zip((f"grad_{n}" for n in ("r", "w", "k", "v", "a", "b", "s0")), both, strict=True))
    for out in case["outputs"]:
        ours = found[out["name"]].detach()
        assert list(ours.shape) == out["shape"], out["name"]
        where = slice(None) if out["index"] == "all" else out["index"]
        off = np.abs(ours.double().flatten().numpy()[where] - np.asarray(out["value"])).max()
        assert off <= 2e-5 * out["std"], (out["name"], off / out["std"])


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize(("op", "plain", "make"), [(wkv6_state, wkv6, inputs6), (wkv7_state, wkv7, inputs7)])
def test_parts_join(op, plain, make, backend):
    """No state is a state of 0; parts that hand their states on are the whole."""
    x = make(P=3)
    initial = x.pop("initial")
    alike = {"u"} & x.keys()

    def part(rows):
        return {name: value if name in alike else value[:, rows] for name, value in x.items()}

    with use_backend(backend):
        y, last = op(**x)
        torch.testing.assert_close(y, plain(**x, **({"bidirectional": False} if plain is wkv6 else {})))
        whole, end = op(**x, initial=initial)
        state, parts = initial, []
        for rows in (slice(0, 1), slice(1, 7), slice(7, 11)):
            y, state = op(**part(rows), initial=state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, end)
    assert end.shape == initial.shape and not torch.allclose(end, last)


@pytest.mark.parametrize("backend", (None, "reference"))
def test_parts_of_ssd_join(backend):
    """Parts hand their states on; a state of values and keys, shared by the heads of a group as its keys are."""
    B, L, H, P, N = 2, 13, 4, 3, 5
    x = dict(x=torch.randn(B, L, H, P), dt=torch.rand(B, L, H), B=torch.randn(B, L, 2, N), C=torch.randn(B, L, 2, N))
    x = {name: value.double() for name, value in x.items()}
    A, D, initial = -torch.rand(H).double(), torch.randn(H).double(), torch.randn(B, H, P, N).double()
    with use_backend(backend):
        torch.testing.assert_close(ssd_state(**x, A=A, D=D)[0], ssd(**x, A=A, D=D))
        whole, end = ssd_state(**x, A=A, D=D, initial=initial, chunk_size=4)
        state, parts = initial, []
        for rows in (slice(0, 1), slice(1, 9), slice(9, 13)):
            y, state = ssd_state(**{k: v[:, rows] for k, v in x.items()}, A=A, D=D, initial=state, chunk_size=4)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state, end)
        one, after = ssd_state(**{k: v[:, :1] for k, v in x.items()}, A=A, initial=initial)
    decay = torch.exp(x["dt"][:, 0] * A)[..., None, None]
    keys = x["B"][:, 0].repeat_interleave(2, 1)
    expected = decay * initial + x["dt"][:, 0, :, None, None] * x["x"][:, 0].unsqueeze(-1) * keys.unsqueeze(-2)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(one[:, 0], (expected @ x["C"][:, 0].repeat_interleave(2, 1).unsqueeze(-1)).squeeze(-1))
    leaves = [value.requires_grad_() for value in (*x.values(), A, D, initial)]

    def run(x, dt, B, C, A, D, initial):
        return ssd_state(x, dt, A, B, C, D, initial, chunk_size=4)

    assert gradcheck(run, leaves, fast_mode=True)
    with pytest.raises(ValueError, match=r"initial: expected \(B, H, P, N\) = \(2, 4, 3, 5\), got \(2, 4, 5, 3\)"):
        run(*leaves[:-1], initial.mT)


def scanned(B=2, L=11, G=2, D=3, N=4, R=2):
    """Arguments of a scan without and with an axis of tokens, in float64."""
    tokens = dict(
        u=torch.randn(B, L, G, D), dt=torch.randn(B, L, G, R), B=torch.randn(B, L, G, N), C=torch.randn(B, L, G, N)
    )
    rest = dict(
        A=-torch.rand(G, D, N) - 0.1, D=torch.randn(G, D), dt_weight=torch.randn(G, D, R), dt_bias=torch.randn(G, D)
    )
    initial = torch.randn(B, G, D, N).double()
    return *({name: x.double() for name, x in part.items()} for part in (tokens, rest)), initial


@pytest.mark.parametrize("backend", (None, "reference"))
def test_parts_of_a_selective_scan_join(backend):
    """No state is a state of 0; parts hand their states on; a step by hand."""
    tokens, rest, initial = scanned()
    with use_backend(backend):
        torch.testing.assert_close(selective_scan_state(**tokens, **rest)[0], selective_scan(**tokens, **rest))
        whole, end = selective_scan_state(**tokens, **rest, initial=initial)
        state, parts = initial, []
        for rows in (slice(0, 1), slice(1, 7), slice(7, 11)):
            y, state = selective_scan_state(**{k: v[:, rows] for k, v in tokens.items()}, **rest, initial=state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state, end)
        first = {k: v[:, 0] for k, v in tokens.items()}
        y, after = selective_scan_state(**{k: v[:, None] for k, v in first.items()}, **rest, initial=initial)
    step = F.softplus(torch.einsum("bgr,gdr->bgd", first["dt"], rest["dt_weight"]) + rest["dt_bias"]).unsqueeze(-1)
    expected = torch.exp(step * rest["A"]) * initial + step * first["B"].unsqueeze(2) * first["u"].unsqueeze(3)
    torch.testing.assert_close(after, expected)
    read = (expected @ first["C"].unsqueeze(3)).squeeze(3) + rest["D"] * first["u"]
    torch.testing.assert_close(y[:, 0], read)


def test_states_of_a_selective_scan_along_an_order():
    """The order of each group and item; tokens that no step visits stay 0."""
    tokens, rest, initial = scanned()
    order = torch.stack([torch.stack([torch.randperm(11)[:8] for _ in range(2)]) for _ in range(2)])
    found, end = selective_scan_state(**tokens, **rest, initial=initial, order=order)
    place = order.mT.unsqueeze(3)
    moved = {k: v.gather(1, place.expand(-1, -1, -1, v.shape[3])) for k, v in tokens.items()}
    y, last = selective_scan_state(**moved, **rest, initial=initial)
    expected = torch.zeros_like(found).scatter(1, place.expand_as(y), y)
    torch.testing.assert_close((found, end), (expected, last))


def test_gradients_of_the_states_of_a_selective_scan():
    tokens, rest, initial = scanned(B=1, L=4, D=2, N=3)
    names = [*tokens, *rest, "initial"]
    leaves = [x.requires_grad_() for x in (*tokens.values(), *rest.values(), initial)]
    assert gradcheck(lambda *x: selective_scan_state(**dict(zip(names, x, strict=True))), leaves, fast_mode=True)


def test_states_of_a_selective_scan_in_low_precision():
    """The state stays in float32, the output has the dtype of the activations."""
    tokens, rest, initial = scanned(L=50)
    low = {k: x.bfloat16() for k, x in tokens.items()}
    y, state = selective_scan_state(**low, **rest, initial=initial)
    exact, last = selective_scan_state(**{k: x.double() for k, x in low.items()}, **rest, initial=initial)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"initial: expected \(B, G, D, N\) = \(2, 2, 3, 4\), got \(2, 2, 4, 3\)"):
        selective_scan_state(**tokens, **rest, initial=initial.mT)


def both_ends(shared, **sizes):
    x = inputs6(**sizes)
    shape = x.pop("initial").shape
    lead = () if shared else shape[:1]
    return x | dict(initial=torch.randn(*lead, 2, *shape[1:], dtype=x["r"].dtype))


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("order", (None, "one", "each"))
def test_states_at_both_ends(shared, order):
    """`wkv6` from two states is a scan forwards from the one, and one backwards from the other without the bonus."""
    x = both_ends(shared, P=3)
    order = {"one": torch.randperm(11)[:8], "each": torch.stack([torch.randperm(11)[:8] for _ in range(2)])}.get(order)
    walk = torch.arange(11).expand(2, -1) if order is None else order.expand(2, -1)
    place = walk[..., None, None].expand(-1, -1, 2, 4)
    u, ends = x["u"], x["initial"].unbind(-4)
    parts = {
        name: value.gather(1, place[..., : value.shape[-1]])
        for name, value in x.items()
        if value.dim() == 4 and name != "initial"
    }
    forth = wkv6_state(**parts, u=u, initial=ends[0])[0]
    back = wkv6_state(**{n: value.flip(1) for n, value in parts.items()}, u=0 * u, initial=ends[1])[0].flip(1)
    expected = torch.zeros_like(x["v"]).scatter(1, place[..., :3], forth + back)
    torch.testing.assert_close(wkv6(**x, order=order), expected)
    x["initial"] = x["initial"][..., :1, :, :, :]
    expected = torch.zeros_like(x["v"]).scatter(1, place[..., :3], forth)
    torch.testing.assert_close(wkv6(**x, order=order, bidirectional=False), expected)


def test_derivatives_of_states_at_both_ends():
    x = both_ends(True, B=2, L=4, H=1, N=2, P=2)
    leaves = tuple(value.requires_grad_() for value in x.values())
    assert gradcheck(lambda *v: wkv6(**dict(zip(x, v, strict=True))), leaves)
    x["w"] = (200 * torch.ones_like(x["w"])).detach().requires_grad_()  # decays of 0
    y = wkv6(**x)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(x.values())))


def test_steep_decays_at_the_ends():
    """The far end's state is read as precisely as the near one's, behind whatever decays."""
    x = both_ends(True, B=1, L=50, H=1, N=4)
    x["w"] = torch.where(torch.rand_like(x["w"]) < 0.3, 9.0, -5.0).double()
    low = {name: value.float() for name, value in x.items()}
    torch.testing.assert_close(wkv6(**low).double(), wkv6(**x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "make"), [(wkv6_state, inputs6), (wkv7_state, inputs7)])
def test_states_along_an_order(op, make):
    x = make(P=3)
    order = torch.stack([torch.randperm(11)[:9] for _ in range(2)])
    place = order[..., None, None]
    parts = {
        n: v.gather(1, place.expand(-1, -1, *v.shape[2:])) if n not in ("u", "initial") else v for n, v in x.items()
    }
    expected, state = op(**parts)
    y, last = op(**x, order=order)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(y.gather(1, place.expand(-1, -1, 2, 3)), expected)
    torch.testing.assert_close(op(**x, order=order[0])[1][0], state[0])


def test_by_hand():
    """One step: what the state held decays, is erased along `a`, and is written to; then it is read."""
    x = inputs7(B=1, L=1, H=1, N=3, P=2)
    S, (r, w, k, v, a, b) = x["initial"][0, 0], (x[name][0, 0, 0] for name in ("r", "w", "k", "v", "a", "b"))
    expected = S @ (torch.diag((-w.exp()).exp()) + torch.outer(a, b)) + torch.outer(v, k)
    y, state = wkv7_state(**x)
    torch.testing.assert_close(state[0, 0], expected)
    torch.testing.assert_close(y[0, 0, 0], expected @ r)
    x = inputs6(B=1, L=1, H=1, N=3, P=2)
    y, state = wkv6_state(**x)
    S, (r, k, v, w) = x["initial"][0, 0], (x[name][0, 0, 0] for name in ("r", "k", "v", "w"))
    torch.testing.assert_close(state[0, 0], S * (-w.exp()).exp() + torch.outer(v, k))
    torch.testing.assert_close(y[0, 0, 0], S @ r + (r * x["u"][0] * k).sum() * v)


@pytest.mark.parametrize(("op", "make"), [(wkv6_state, inputs6), (wkv7_state, inputs7)])
def test_derivatives(op, make):
    x = make(B=1, L=4, H=1, N=2, P=2, shared=True)
    leaves = tuple(value.requires_grad_() for value in x.values())

    def run(*values):
        return op(**dict(zip(x, values, strict=True)))

    assert gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(lambda *v: run(*v)[1], leaves, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_precision(dtype):
    """States stay in float32."""
    x = {name: value.to(dtype) for name, value in inputs7(L=100).items()}
    x["a"] = x["a"] / 4
    y, state = wkv7_state(**x)
    assert y.dtype == dtype and state.dtype == torch.float32
    exact = wkv7_state(**{name: value.double() for name, value in x.items()})
    assert (state - exact[1]).abs().max() <= 1e-4 * exact[1].abs().max()


def test_compile_and_export():
    x = inputs7(dtype=torch.float32)
    compiled = torch.compile(wkv7_state, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), wkv7_state(**x))

    class Model(torch.nn.Module):
        def forward(self, r, w, k, v, a, b, initial):
            return wkv7_state(r, w, k, v, a, b, initial)

    shapes = {name: {} if name == "initial" else {1: torch.export.Dim("length", min=2, max=512)} for name in x}
    program = torch.export.export(Model(), tuple(x.values()), dynamic_shapes=shapes).module()
    other = inputs7(L=30, dtype=torch.float32)
    torch.testing.assert_close(program(*other.values()), wkv7_state(**other))


def test_bad_states():
    x = inputs7(P=3)
    with pytest.raises(ValueError, match=r"initial: expected \(B, H, P, N\) = \(2, 2, 3, 4\), got \(2, 2, 4, 3\)"):
        wkv7_state(**{**x, "initial": x["initial"].mT})
    with pytest.raises(ValueError, match=r"initial: expected \(H, P, N\) = \(2, 3, 4\), got \(1, 3, 4\)"):
        wkv7_state(**{**x, "initial": x["initial"][0, :1]})
    with pytest.raises(TypeError, match="initial: expected float64, float32, bfloat16 or float16, got torch.int64"):
        wkv7_state(**{**x, "initial": x["initial"].long()})
    x = both_ends(True, P=3)
    with pytest.raises(ValueError, match=r"initial: expected \(2, H, P, N\) = \(2, 2, 3, 4\), got \(1, 2, 3, 4\)"):
        wkv6(**{**x, "initial": x["initial"][:1]})
    with pytest.raises(ValueError, match=r"initial: expected \(B, 1, H, P, N\)"):
        wkv6(**{**x, "initial": x["initial"][0]}, bidirectional=False)
