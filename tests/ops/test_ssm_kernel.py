"""ssm_kernel and fft_conv: kernels by the dense state space, the CPU kernel against the reference, and gradcheck."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from linzoo.ops import fft_conv, ssm_kernel, use_backend

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402


def make_inputs(H=3, N=5, channels=None, rank=0, dtype=torch.float64):
    shape = (H, N, 2) if channels is None else (channels, H, N, 2)
    A = torch.randn(H, N, 2, dtype=torch.float64) * torch.tensor([0.2, 6.0]) - torch.tensor([0.8, 0.0])
    B, C = torch.randn(H, N, 2, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    tensors = [A, B, C, 0.1 * torch.rand(H, dtype=torch.float64) + 0.05]
    tensors += [0.3 * torch.randn(rank, H, N, 2, dtype=torch.float64)] if rank else []
    return [t.to(dtype).requires_grad_() for t in tensors]


def call(inputs, length, discretization="zoh"):
    A, B, C, dt, *P = inputs
    P = P[0] if P else None
    return ssm_kernel(A, B, C, dt, length, P=P, discretization="bilinear" if P is not None else discretization)


def results(inputs, backend, *args):
    with use_backend(backend):
        k = call(inputs, *args)
        torch.manual_seed(1)
        return [k, *torch.autograd.grad(k, inputs, torch.randn_like(k))]


def dense_system(A, B, C, dt, P=None):
    """dA, dB and C of the whole system, both modes of each pair."""
    A, B, C = (torch.view_as_complex(t) for t in (A, B, C))
    A, B, C = (torch.cat([t, t.conj()], -1) for t in (A, B, C))
    matrix = torch.diag_embed(A)
    if P is not None:
        P = torch.view_as_complex(P)
        P = torch.cat([P, P.conj()], -1)
        matrix = matrix - torch.einsum("rhn,rhm->hnm", P, P.conj())
    half, eye = dt[:, None, None] / 2 * matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return torch.linalg.solve(eye - half, eye + half), torch.linalg.solve(eye - half, dt[:, None] * B), C


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_parity(backend):
    case = json.loads((PARITY / "ops" / "op_s4d_kernel.json").read_text())
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    A = torch.stack([-state["A_real"].exp(), -state["A_imag"]], -1)
    for out in case["outputs"]:
        if out["name"].startswith("K_"):
            with use_backend(backend):
                inputs = A, state["B"][0], state["C"][0], state["inv_dt"][:, 0].exp()
                k = ssm_kernel(*inputs, case["kwargs"]["L"], discretization=out["name"][2:])
            error = (k.double().flatten() - torch.tensor(out["value"], dtype=torch.float64)).abs().max()
            assert error <= case.get("tolerance", 2e-4) * out["std"]


@pytest.mark.parametrize("rank", (0, 1, 2))
@pytest.mark.parametrize("length", (1, 2, 7, 16))
def test_kernel_is_that_of_the_dense_system(rank, length):
    inputs = [t.detach() for t in make_inputs(rank=rank)]
    dA, dB, C = dense_system(*inputs)
    powers = torch.stack([torch.linalg.matrix_power(dA, l) for l in range(length)])
    expected = torch.einsum("hn,lhnm,hm->hl", C, powers, dB)
    assert expected.imag.abs().max() < 1e-12
    if rank:  # S4 stores C (I - dA^L), which truncates the generating function
        eye = torch.eye(dA.shape[-1], dtype=dA.dtype)
        truncated = torch.einsum("hn,hnm->hm", C, eye - torch.linalg.matrix_power(dA, length))
        inputs[2] = torch.view_as_real(truncated[:, : truncated.shape[1] // 2]).contiguous()
    torch.testing.assert_close(call(inputs, length, "bilinear"), expected.real)


def test_zoh_is_the_exact_solution_of_a_held_input():
    A, B, C, dt = (t.detach() for t in make_inputs(H=1, N=1))
    fine = [A, B, C, dt / 1000]
    step = call(fine, 3000).unflatten(1, (3, 1000)).sum(-1)
    shifted = call(fine, 2999).cumsum(1)[:, [999, 1999, 2998]].diff(dim=1)
    torch.testing.assert_close(call([A, B, C, dt], 3)[:, 1], shifted[:, 0], rtol=5e-3, atol=5e-3)
    assert step.shape == (1, 3)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("shape", "length"), (((1, 1, None, 0), 1), ((3, 5, 2, 0), 1100), ((4, 17, 3, 1), 33)))
def test_cpu_equals_reference(dtype, shape, length):
    inputs = make_inputs(*shape, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    names, runs = (
        ("k", "A", "B", "C", "dt", "P"),
        [results(inputs, backend, length) for backend in ("cpu", "reference")],
    )
    for name, got, expected in zip(names[: len(inputs) + 1], *runs, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        scale = expected.double().abs().max()
        limit = 1e-2 if got.dtype in (torch.bfloat16, torch.float16) else tolerance
        assert (got.double() - expected.double()).abs().max() <= limit * scale, name


def test_half_precision_is_read_in_float32():
    inputs = make_inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k = call(inputs, 20)
    assert k.dtype == torch.float32
    assert torch.equal(k, call([t.float() for t in inputs], 20))


def test_long_kernels_keep_their_phase():
    """exp(l x) at step 8000 in float32 is that of the float32 inputs, not of a rounded l x."""
    A, B, C, dt = (t.detach() for t in make_inputs(H=2, N=4, dtype=torch.float32))
    A[..., 0], dt[:] = -1e-4, 0.125
    exact = call([t.double() for t in (A, B, C, dt)], 8192)
    with use_backend("cpu"):
        ours = call([A, B, C, dt], 8192)
    assert (ours.double() - exact).abs().max() <= 1e-4 * exact.std()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize(("rank", "discretization"), ((0, "zoh"), (0, "bilinear"), (1, "bilinear"), (2, "bilinear")))
def test_gradcheck(backend, rank, discretization):
    with use_backend(backend):
        inputs = make_inputs(2, 3, 2, rank)
        assert gradcheck(lambda *x: call(x, 9, discretization), inputs)


def test_opcheck():
    c, x, v = torch.randn(2, 3, 2), -torch.rand(2, 3, 2), torch.randn(2, 4, 3, 2)
    nodes = torch.rand(5, 2)
    for op, inputs in ((torch.ops.linzoo.vandermonde, (c, x, 7)), (torch.ops.linzoo.cauchy, (v, x, nodes))):
        leaves = [t.clone().requires_grad_() if torch.is_tensor(t) and t is not nodes else t for t in inputs]
        torch.library.opcheck(op.default, leaves)
        dy = torch.randn_like(op(*inputs))
        backward = getattr(torch.ops.linzoo, f"{op.__name__}_backward").default
        torch.library.opcheck(backward, (dy, *inputs))


def test_results_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        for rank in (0, 1):
            inputs, runs = make_inputs(5, 20, 2, rank, torch.float32), []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                runs.append(results(inputs, "cpu", 2100))
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rank", (0, 1))
def test_compile_and_export(rank):
    inputs = make_inputs(rank=rank, dtype=torch.float32)
    expected = call(inputs, 20)
    compiled = torch.compile(lambda *x: call(x, 20), fullgraph=True, backend="aot_eager")
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
    with use_backend("export"):
        torch.testing.assert_close(call(inputs, 20), expected, rtol=1e-4, atol=1e-5)

    class Kernel(torch.nn.Module):
        def forward(self, u, *inputs):
            return call(inputs, u.shape[0])

    # S4's C belongs to one length, S4D's kernel has any.
    shapes = {"u": {} if rank else {0: torch.export.Dim("length", min=2)}, "inputs": tuple({} for _ in inputs)}
    u = torch.zeros(20 if rank else 9)
    program = torch.export.export(Kernel(), (u, *inputs), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(torch.zeros(20), *inputs), expected)


def test_bad_arguments():
    A, B, C, dt, P = make_inputs(rank=1)
    with pytest.raises(ValueError, match=r"discretization: expected one of zoh, bilinear, got 'euler'"):
        ssm_kernel(A, B, C, dt, 8, discretization="euler")
    with pytest.raises(ValueError, match="discretization: expected 'bilinear' with P"):
        ssm_kernel(A, B, C, dt, 8, P=P)
    with pytest.raises(ValueError, match=r"B: expected \(H, N, 2\) = \(3, 5, 2\), got \(3, 4, 2\)"):
        ssm_kernel(A, B[:, 1:], C, dt, 8)
    with pytest.raises(ValueError, match="length: expected a positive number of steps, got 0"):
        ssm_kernel(A, B, C, dt, 0)
    with pytest.raises(TypeError, match="C: .*int64"):
        ssm_kernel(A, B, C.long(), dt, 8)
    with pytest.raises(ValueError, match="dt: expected on cpu as A, got meta"):
        ssm_kernel(A, B, C, dt.to("meta"), 8)


# --- fft_conv -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", (1, 4, 9, 13))
def test_convolution_is_the_sum_of_its_definition(taps):
    u, k, back = torch.randn(2, 9, 3, dtype=torch.float64), *torch.randn(2, 3, taps, dtype=torch.float64)
    causal, both = torch.zeros_like(u), torch.zeros_like(u)
    for t in range(9):
        for j in range(taps):
            causal[:, t] += k[:, j] * u[:, t - j] if t >= j else 0
            both[:, t] += back[:, j] * u[:, t + 1 + j] if t + 1 + j < 9 else 0
    torch.testing.assert_close(fft_conv(u, k), causal)
    torch.testing.assert_close(fft_conv(u, k, back), causal + both)


def test_convolution_along_two_axes_goes_one_after_the_other():
    u = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    k, back = ([torch.randn(2, 3, taps, dtype=torch.float64) for taps in (5, 4)] for _ in range(2))
    expected = 0
    for r in range(2):
        rows = fft_conv(u.transpose(1, 2).flatten(0, 1), k[0][r], back[0][r]).unflatten(0, (2, 7)).transpose(1, 2)
        expected = expected + fft_conv(rows.flatten(0, 1), k[1][r], back[1][r]).unflatten(0, (2, 5))
    torch.testing.assert_close(fft_conv(u, k, back), expected)


def test_full_convolution_sums_over_the_inputs():
    u, k = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(4 * 3, 5, dtype=torch.float64)
    expected = torch.stack([fft_conv(u, k[3 * o : 3 * o + 3]).sum(-1) for o in range(4)], -1)
    torch.testing.assert_close(fft_conv(u, k, out_channels=4), expected)


def test_convolution_of_half_precision_and_bad_arguments():
    u, k = torch.randn(2, 6, 3), torch.randn(3, 6)
    y = fft_conv(u.bfloat16(), k)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), fft_conv(u, k), rtol=0.05, atol=0.1)
    with pytest.raises(ValueError, match=r"kernels: expected \(H, l\) or \(R, H, l\) with H = 3, got \(4, 6\)"):
        fft_conv(u, torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"u: expected \(B, X, Y, H\), got \(2, 6, 3\)"):
        fft_conv(u, [k, k])
    with pytest.raises(ValueError, match="backward_kernels: expected the shapes of kernels"):
        fft_conv(u, k, k[:, 1:])
