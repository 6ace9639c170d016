"""S4, S5 and their kin: the published layers' values, initial state matrices, and what the layers promise."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from linzoo.backbones.layers import LSSL, S4, S4D, S4ND, S5, ConvS5, ConvS5Layer, S5Mixer, hippo
from linzoo.backbones.layers.s4 import load_published

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402


def load(name):
    """A case's state dict, inputs and outputs."""
    case = json.loads((PARITY / "ops" / f"{name}.json").read_text())
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    inputs = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    return case, state, inputs


def assert_parity(case, ours, default=2e-4):
    """`ours` ``{name: tensor}`` within the case's tolerance of its outputs, as multiples of their deviation."""
    by_name = {out["name"]: out for out in case["outputs"]}
    for name, tensor in ours.items():
        out = by_name[name]
        where = slice(None) if out["index"] == "all" else out["index"]
        got, expected = tensor.detach().double().flatten()[where], torch.tensor(out["value"], dtype=torch.float64)
        assert list(tensor.shape) == out["shape"], name
        error = (got - expected).abs().max()
        assert error <= case.get("tolerance", default) * out["std"] + 1e-6, f"{name}: {error / out['std']:.1e}"


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# --- parity ---------------------------------------------------------------------------------------------------------


def test_s4d_initial_matrices():
    case, _, _ = load("op_s4d_kernel")
    lin, inv, legs = (hippo.diagonal_system(init, 32)[0] for init in ("lin", "inv", "legs"))
    _, P, B, _ = hippo.normal_plus_low_rank("legs", 32)
    pairs = {"A_lin": lin.conj(), "A_inv": inv.conj(), "A_legs": legs}
    ours = {name: torch.view_as_real(A.resolve_conj()) for name, A in pairs.items()}
    ours |= {"B_legs_abs2": B.abs() ** 2, "P_legs_abs2": P.abs() ** 2}
    assert_parity(case, ours)


def test_s4d_layer():
    case, state, (x,) = load("s4d_layer")
    layer = S4D(32, 64)
    load_published(layer, state)
    assert_parity(case, {"y": layer(x.transpose(1, 2)).transpose(1, 2), "K": layer.kernel[0](100)[0]})


def test_s4d_block_bidirectional():
    case, state, (x,) = load("s4d_block_bidir")
    layer = S4D(32, 16, bidirectional=True, init="inv")
    load_published(layer, state)
    assert_parity(case, {"y": layer(x.transpose(1, 2)).transpose(1, 2)})


def test_s4nd_layer():
    case, state, (x,) = load("s4nd_layer")
    layer = S4ND(8, 2, "diagonal", 16, init="inv")
    load_published(layer, state)
    rows, columns = layer.kernels(x.shape[2:])
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_parity(case, {"y": y, "K_axis0": rows[:, 0, 0], "K_axis1": columns[:, 0, 0]})


@pytest.mark.parametrize("stored", (0, 12, 40))
def test_published_s4_weights_belong_to_a_length(stored):
    """Whatever length the authors' C is that of, and where it is the true C, the kernel is the same."""
    layer = S4(4, 8, length=24, bidirectional=True, dt_min=0.01, dtype=torch.float64)
    kernel, expected = layer.kernel[0], layer.kernel[0]()
    if stored:
        kernel.attune(stored)
    else:  # very long kernels have C (I - dA^L) = C
        kernel.attune(20_000)
    state = {f"layer.kernel.{n}": getattr(kernel, n).detach().clone() for n in ("P", "C")}
    state |= {"layer.kernel.A_real": kernel.A_log.detach(), "layer.kernel.A_imag": -kernel.A_imag.detach()}
    state |= {"layer.kernel.B": kernel.B.detach().unsqueeze(0), "layer.kernel.inv_dt": kernel.log_dt.detach()[:, None]}
    state |= {"layer.D": layer.D.detach(), "layer.kernel.l_kernel": torch.tensor(stored)}
    state |= {f"output_linear.0.{n}": getattr(layer.out_proj, n).detach() for n in ("weight", "bias")}
    other = S4(4, 8, length=24, bidirectional=True, dtype=torch.float64)
    load_published(other, state)
    torch.testing.assert_close(other.kernel[0](), expected)
    u = torch.randn(2, 30, 4, dtype=torch.float64)
    layer.kernel[0].attune(24)
    torch.testing.assert_close(other(u), layer(u))


def s5_state(state, ours):
    modes = {"Lambda_re": "Lambda_re", "Lambda_im": "Lambda_im", "B": "B", "D": "D"}
    C = state["C"] if "C" in state else torch.cat([state["C1"], state["C2"]], 1)
    return {o: state[theirs] for o, theirs in modes.items()} | {"log_step": state["log_step"][:, 0], "C": C}


def test_s5_layer():
    case, state, (x,) = load("s5_layer")
    ours, x = {}, x.unsqueeze(0)
    for discretization, name in (("zoh", "y"), ("bilinear", "y_bilinear")):
        layer = S5(32, 64, blocks=2, bidirectional=True, discretization=discretization)
        layer.load_state_dict(s5_state(state, layer))
        ours[name] = layer(x)[0]
    layer.discretization = "zoh"
    ours["y_rescale2"] = layer(x, rate=2.0)[0]
    Lambda, _, B, _ = hippo.normal_plus_low_rank("legs", 32)
    ours |= {"Lambda_hippo_n": torch.view_as_real(Lambda), "B_hippo_abs2": B.abs() ** 2}
    assert_parity(case, ours)


def test_s5_block():
    case, state, (x,) = load("s5_block")
    layer = S5Mixer(32, "half_glu1", d_state=64)
    ssm = s5_state({k.removeprefix("seq."): v for k, v in state.items()}, layer)
    gate = {"gate.weight": state["out2.kernel"].T, "gate.bias": state["out2.bias"]}
    layer.load_state_dict({**under("ssm.", ssm), **gate})
    z = F.layer_norm(x, (32,), state["norm.scale"], state["norm.bias"], eps=1e-6)
    assert_parity(case, {"y": x + layer(z.unsqueeze(0))[0]})


def test_lssl_layer():
    case, state, (x,) = load("lssl_layer")
    layer = LSSL(16, 16, channels=2)
    proj = {f"out_proj.{name}": state[f"output_linear.{name}"] for name in ("weight", "bias")}
    given = {**proj, "C": state["C"], "D": state["D"], "log_dt": state["log_dt"]}
    missing, unexpected = layer.load_state_dict(given, strict=False)
    assert missing == ["A", "B"] and not unexpected
    assert_parity(case, {"y": layer(x), "K": layer.kernel(100)})


def convs5_state(state, prefix=""):
    s = {name.removeprefix(prefix): value for name, value in state.items()}
    taps = s["C"].shape[0]
    return {
        "Lambda_re": s["Lambda_re"],
        "Lambda_im": s["Lambda_im"],
        "log_step": s["log_step"][:, 0],
        "B": s["B"].unflatten(1, (-1, taps, taps)),
        "C": s["C"].permute(3, 2, 0, 1, 4),
    }


def head_state(state, prefix):
    ours = {}
    for name, value in state.items():
        if name.startswith(prefix):
            kind, index, leaf = name.removeprefix(prefix).replace(".", "_").split("_")
            key = f"head.{'conv' if kind == 'Conv' else 'norm'}.{index}.{'bias' if leaf == 'bias' else 'weight'}"
            ours[key] = value.permute(3, 2, 0, 1) if leaf == "kernel" else value
    return ours


def test_convs5_ssm_and_standard_head():
    case, state, (x,) = load("op_convs5")
    layer = ConvS5Layer(4, "standard", None, num_groups=2, d_state=16, blocks=2)
    layer.load_state_dict({**under("ssm.", convs5_state(state)), **head_state(state, "C_D_conv.")})
    u = x.permute(0, 1, 3, 4, 2)
    y_ssm, last = layer.ssm(u)
    y, state = layer(u)
    ours = {"y_ssm": y_ssm.permute(0, 1, 4, 2, 3), "x_last": last.permute(0, 3, 1, 2, 4)}
    ours["y"] = (y - u).permute(0, 1, 4, 2, 3)
    assert_parity(case, ours)
    assert torch.equal(state, last)


def test_convs5_layer():
    case, state, (x,) = load("convs5_layer")
    layer = ConvS5Layer(4, "resnet", "post", num_groups=2, d_state=16, blocks=2)
    norm = {"norm.weight": state["norm.scale"], "norm.bias": state["norm.bias"]}
    ssm = convs5_state({k: v for k, v in state.items() if k.startswith("seq.")}, "seq.")
    layer.load_state_dict({**under("ssm.", ssm), **head_state(state, "seq.C_D_conv."), **norm})
    assert_parity(case, {"y": layer(x.permute(0, 1, 3, 4, 2))[0].permute(0, 1, 4, 2, 3)})


def test_ptd_definition():
    case, state, _ = load("op_ptd_init")
    kwargs, E, C = case["kwargs"], state["E"].double(), state["C"].double()[0]
    A, B, P = hippo.hippo_legs(kwargs["N"])
    Lambda, V = hippo.diagonalise(A + E)
    norms = [torch.linalg.cond(V), torch.linalg.matrix_norm(E, 2), torch.linalg.matrix_norm(E)]
    B_tilde, C_tilde = torch.linalg.solve(V, B + 0j), (C + 0j) @ V
    from linzoo.ops import ssm_kernel

    parts = (torch.view_as_real(t).unsqueeze(0) for t in (Lambda, B_tilde, C_tilde / 2))
    K = ssm_kernel(*parts, torch.tensor([kwargs["dt"]], dtype=torch.float64), kwargs["L"])[0]
    omega = torch.tensor(kwargs["omega"], dtype=torch.float64)
    systems = {"G_ptd": (A + E, B), "G_hippo": (A, B), "G_s4d_legs": (A + torch.outer(P, P), B / 2)}
    ours = {name: torch.view_as_real(hippo.transfer(*s, C, omega)) for name, s in systems.items()}
    ours |= {"Lambda": torch.view_as_real(Lambda), "B_tilde_abs": B_tilde.abs(), "K": K}
    ours["cond_norms"] = torch.stack([*norms, torch.linalg.matrix_norm(A, 2)])
    assert_parity(case, ours, 1e-6)


# --- initial state matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ("legs", "fourier"))
def test_hippo_is_normal_plus_low_rank(measure):
    A, B, _ = hippo.MEASURES[measure](16)
    Lambda, P, b, V = hippo.normal_plus_low_rank(measure, 16)
    V, Lambda, P, b = (torch.cat([t, t.conj()], -1) for t in (V, Lambda, P, b))
    eye = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(V @ V.mH, eye + 0j)
    torch.testing.assert_close((V @ (torch.diag(Lambda) - torch.outer(P, P.conj())) @ V.mH).real, A)
    torch.testing.assert_close((V @ b).real, B)


@pytest.mark.parametrize("size", (8, 16, 32))
def test_ptd_is_a_small_perturbation_with_good_eigenvectors(size):
    Lambda, V, E = hippo.perturb_then_diagonalise(size)
    A = hippo.hippo_legs(size)[0]
    torch.testing.assert_close(V @ torch.diag(Lambda) @ torch.linalg.inv(V), A + E + 0j)
    assert torch.linalg.cond(V) < 15
    assert 0.01 < torch.linalg.matrix_norm(E, 2) / torch.linalg.matrix_norm(A, 2) < 0.1
    assert (Lambda.real < 0).all()
    if size == 16:
        assert torch.linalg.cond(torch.linalg.eig(A).eigenvectors) > 1e8


def test_ptd_layers_begin_as_real_systems():
    """In V's coordinates their B and C are those of a real system with the state matrix A + E."""
    Lambda, V, E = hippo.perturb_then_diagonalise(16)
    legs, B, _ = hippo.hippo_legs(16)
    kernel = S4D(3, 16, init="ptd", dtype=torch.float64).kernel[0]
    A, b, C, dt = kernel.state_space()
    torch.testing.assert_close(torch.view_as_complex(A[0]), Lambda)
    torch.testing.assert_close(V @ torch.view_as_complex(b[0].contiguous()), B + 0j)
    C = 2 * torch.view_as_complex(C[0].detach()) @ torch.linalg.inv(V)
    assert C.imag.abs().max() < 1e-9
    steps = dt[:, None, None] * torch.arange(1, 9, dtype=torch.float64)[:, None]
    grown = torch.linalg.matrix_exp(steps.unsqueeze(-1) * (legs + E))  # (H, 8, N, N)
    integral = torch.linalg.solve(legs + E, grown - torch.eye(16, dtype=torch.float64)) @ B
    torch.testing.assert_close(kernel(8)[0].cumsum(-1), torch.einsum("hn,hln->hl", C.real, integral))
    B = V @ torch.view_as_complex(S5(3, 16, init="ptd", dtype=torch.float64).B.detach())
    assert B.imag.abs().max() < 1e-9


def test_unknown_names():
    with pytest.raises(ValueError, match="init: expected one of lin, inv, inv2, quad, real, legs, got 'lag'"):
        hippo.diagonal_system("lag", 8)
    with pytest.raises(ValueError, match="measure: expected one of legs, fourier, got 'lagt'"):
        hippo.normal_plus_low_rank("lagt", 8)
    with pytest.raises(ValueError, match="size: expected an even number of states, got 7"):
        hippo.diagonal_system("legs", 7)
    with pytest.raises(ValueError, match="blocks: expected a divisor of 32 states, got 3"):
        S5(4, 32, blocks=3)


# --- layers ---------------------------------------------------------------------------------------------------------


def recurrence(kernel, length):
    """S4's kernel by running its dense system step by step, from its true C."""
    A, B, C, P, dt = (torch.view_as_complex(t) if t.dim() > 1 else t for t in kernel.state_space())
    A, B, C, P = (torch.cat([t, t.conj()], -1) for t in (A, B, C, P))
    matrix = torch.diag_embed(A) - torch.einsum("rhn,rhm->hnm", P, P.conj())
    eye, half = torch.eye(A.shape[-1], dtype=A.dtype), dt[:, None, None] / 2 * matrix
    step, x = torch.linalg.solve(eye - half, eye + half), torch.linalg.solve(eye - half, dt[:, None] * B)
    C = torch.linalg.solve(eye - torch.linalg.matrix_power(step, kernel.length), C.transpose(0, 1), left=False)
    out = []
    for _ in range(length):
        out.append(torch.einsum("hcn,hn->ch", C, x).real)
        x = torch.einsum("hnm,hm->hn", step, x)
    return torch.stack(out, -1)


@pytest.mark.parametrize("init", ("legs", "fourier"))
def test_s4_is_its_recurrence_at_every_length(init):
    kernel = S4(3, 8, init=init, length=24, dtype=torch.float64, dt_min=0.01).kernel[0]
    before = kernel()
    torch.testing.assert_close(before, recurrence(kernel, 24))
    kernel.attune(40)
    assert kernel().shape == (1, 3, 40)
    torch.testing.assert_close(kernel()[..., :24], before)
    torch.testing.assert_close(kernel(), recurrence(kernel, 40))
    kernel.attune(24)
    torch.testing.assert_close(kernel(), before)


def test_s4_at_another_sampling_rate():
    """Half as many samples, twice as far apart, of the same kernel in continuous time, a step of which weighs twice."""
    kernel = S4(3, 8, length=400, dt_min=0.001, dt_max=0.002, dtype=torch.float64).kernel[0]
    fine, coarse = kernel(), kernel(rate=2.0)
    assert coarse.shape[-1] == 200
    assert (coarse[..., 1:].cumsum(-1) - fine.cumsum(-1)[..., 2::2]).abs().max() < 0.05 * fine.cumsum(-1).abs().max()


@pytest.mark.parametrize(
    "make",
    (
        lambda **kw: S4D(6, 8, bidirectional=True, channels=2, **kw),
        lambda **kw: S4D(6, 8, init="ptd", copies=2, bandlimit=1.0, **kw),
        lambda **kw: S4(6, 8, length=9, bidirectional=True, **kw),
        lambda **kw: S5Mixer(6, "full_glu", d_state=16, bidirectional=True, **kw),
        lambda **kw: S5Mixer(6, "half_glu2", d_state=16, init="ptd", blocks=2, **kw),
        lambda **kw: LSSL(6, 8, channels=2, learn=True, **kw),
    ),
)
def test_sequences(make):
    layer, u = make(), torch.randn(2, 13, 6)
    y = layer(u)
    assert y.shape == u.shape
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.cosine_similarity(layer(u).float().flatten(), y.flatten(), dim=0) > 0.99
    if not isinstance(layer, LSSL):  # whose doublings depend on the length
        program = torch.export.export(layer, (u,), dynamic_shapes=({1: torch.export.Dim.AUTO},)).module()
        for other in (torch.cat([u, u], 1), u[:, :8], u[:, :5]):
            torch.testing.assert_close(program(other), layer(other), rtol=1e-4, atol=1e-5)
    fresh = make(device="meta").to_empty(device="cpu")
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert fresh(u).isfinite().all()


@pytest.mark.parametrize("kernel", ("diagonal", "low_rank"))
def test_maps(kernel):
    layer = S4ND(4, 2, kernel, 8, rank=2, channels=2, length=(5, 7) if kernel == "low_rank" else None)
    u = torch.randn(2, 6, 5, 4)
    layer(u).square().mean().backward()
    assert layer(u).shape == u.shape
    assert all(p.grad is not None for p in layer.parameters())
    full = S4ND(4, 2, kernel, 8, linear=True, out_channels=3, length=4)
    assert full(u).shape == (2, 6, 5, 3)
    with pytest.raises(ValueError, match=r"u: expected \(B, 2 axes, 4\)"):
        layer(u[0])


def test_causal_layers_see_no_future():
    for layer in (S4D(4, 8), S4(4, 8, length=10), S5(4, 16), LSSL(4, 8)):
        layer, u = layer.double(), torch.randn(1, 10, 4, dtype=torch.float64)
        later = u.clone()
        later[:, 6:] += 1
        torch.testing.assert_close(layer(later)[:, :6], layer(u)[:, :6])
        assert not torch.allclose(layer(later)[:, 6:], layer(u)[:, 6:])


def test_convs5_goes_on_from_its_state():
    layer, u = ConvS5(4, 16, 2).double(), torch.randn(6, 2, 5, 4, 4, dtype=torch.float64)
    y, last = layer(u)
    first, state = layer(u[:4])
    second, end = layer(u[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), y)
    torch.testing.assert_close(end, last)


def test_bad_arguments():
    with pytest.raises(ValueError, match="length: S4's kernels need one"):
        S4ND(4)
    with pytest.raises(ValueError, match="kernel: expected one of diagonal, low_rank, got 'dense'"):
        S4ND(4, kernel="dense")
    with pytest.raises(ValueError, match="copies: expected a divisor of 4 features, got 3"):
        S4D(4, 8, copies=3)
    with pytest.raises(ValueError, match="activation: expected one of"):
        S5Mixer(4, "relu", d_state=16)
    with pytest.raises(ValueError, match="norm: expected 'pre', 'post' or None"):
        ConvS5Layer(4, norm="both", d_state=16)
