"""Convolution kernels of diagonal and of diagonal-plus-low-rank state spaces (S4D, S4)."""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backend import forced_backend, resolve
from ..selective_scan.reference import state_dtype
from . import reference

__all__ = ["ssm_kernel"]

DISCRETIZATIONS = ("zoh", "bilinear")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ssm_kernel(A, B, C, dt, length, *, P=None, discretization="zoh"):
    """The convolution kernel ``K_l = C dA^l dB`` of a state space with real output, for l = 0 .. length - 1.

    Complex tensors hold (re, im) on their last axis. Only one mode of each conjugate pair is stored, so every sum over
    modes is twice its real part.

    Without `P`, S4D (arXiv 2206.11893, section 3), a sum of N exponentials (a Vandermonde product)::

        zoh:       K_l = 2 Re sum_n B_n C_n (exp(dt A_n) - 1) / A_n          exp(l dt A_n)
        bilinear:  K_l = 2 Re sum_n B_n C_n dt / (1 - dt A_n / 2) ((1 + dt A_n / 2) / (1 - dt A_n / 2))^l

    With `P`, S4 (arXiv 2111.00396, algorithm 1): the state matrix is diag(A) - P P^*, discretised bilinearly. The
    kernel's generating function is evaluated at the roots of unity by four Cauchy products and transformed back. It is
    truncated at `length` by `C`, which must be ``C (I - dA^length)`` of the true C. This is computed in float64: modes
    that hardly decay have poles next to the roots of unity, where float32 keeps few digits.

    Args:
        A: Modes ``(H, N, 2)`` of each of H features; real parts negative. float64, float32, bfloat16 or float16.
        B: Input projection ``(H, N, 2)``.
        C: Output projection ``(H, N, 2)``, or ``(channels, H, N, 2)`` for several outputs.
        dt: Step sizes ``(H,)``, positive.
        length: Steps L.
        P: Low-rank part ``(rank, H, N, 2)``.
        discretization: 'zoh' or 'bilinear'.

    Returns:
        ``(H, L)``, or ``(channels, H, L)``: float32, float64 if any input is float64.

    Raises:
        ValueError: a shape does not fit, `length` is not positive, `discretization` unknown or not bilinear with `P`.
        TypeError: a dtype is not supported.
        RuntimeError: tensors on different devices; a forced backend cannot serve.
    """
    _check(A, B, C, dt, length, P, discretization)
    dtype = state_dtype(A.dtype)
    for tensor in (B, C, dt, P):
        dtype = dtype if tensor is None else torch.promote_types(dtype, state_dtype(tensor.dtype))
    if P is not None:
        A, B, C, P = (torch.view_as_complex(t.double().contiguous()) for t in (A, B, C, P))
        return _dplr_kernel(A, B, C, dt.double().unsqueeze(-1), length, P).to(dtype)
    A, B, C = (torch.view_as_complex(t.to(dtype).contiguous()) for t in (A, B, C))
    dt = dt.to(dtype).unsqueeze(-1)
    if discretization == "zoh":
        steps = dt * A
        weights = B * C * _expm1(steps) / A
    else:
        denominator = 1 - dt * A / 2
        steps = torch.log((1 + dt * A / 2) / denominator)
        weights = B * C * (dt / denominator)
    rows = steps.expand(weights.shape).reshape(-1, steps.shape[-1])
    k = _vandermonde(weights.reshape(rows.shape), rows, length)
    return k.view(*weights.shape[:-1], length)


def _dplr_kernel(A, B, C, dt, length, P):
    squeeze = C.dim() == 2
    C = C.unsqueeze(0) if squeeze else C
    inputs, outputs = torch.cat([B.unsqueeze(0), P]), torch.cat([C, P.conj()])
    products = inputs.unsqueeze(1) * outputs.unsqueeze(0) * dt  # (1 + rank, channels + rank, H, N)
    angle = torch.arange(length // 2 + 1, dtype=dt.dtype, device=dt.device) * (math.pi / length)
    # The nodes 2 (1 - w) / (1 + w) = 2i tan(angle) are kept as sines and cosines: the last of them is infinite.
    nodes = torch.stack([angle.sin(), angle.cos()], -1)
    r = _cauchy(products.flatten(0, 1).transpose(0, 1), dt * A, nodes).transpose(0, 1)
    r = r.unflatten(0, products.shape[:2])  # (1 + rank, channels + rank, H, K)
    channels, cosine = C.shape[0], nodes[:, 1]
    from_input, from_rank, to_rank, between = r[0, :channels], r[1:, :channels], r[0, channels:], r[1:, channels:]
    if P.shape[0] == 1:
        correction = to_rank[0] * from_rank[0] / (1 + cosine * between[0, 0])
    else:  # Woodbury's identity: R_0Q (I + R_PQ)^-1 R_PC
        middle = cosine * between + torch.eye(P.shape[0], device=dt.device, dtype=r.dtype)[:, :, None, None]
        solved = torch.linalg.solve(middle.permute(2, 3, 1, 0), to_rank.permute(1, 2, 0))
        correction = torch.einsum("pchk,hkp->chk", from_rank, solved)
    spectrum = torch.polar(torch.ones_like(angle), angle) * (from_input - cosine * correction)
    k = torch.fft.irfft(spectrum, n=length)
    return k[0] if squeeze else k


def _expm1(x):
    """``exp(x) - 1`` of complex numbers, without cancellation for small ones."""
    half = (x.imag / 2).sin()
    return torch.complex(torch.expm1(x.real) * x.imag.cos() - 2 * half * half, x.real.exp() * x.imag.sin())


def _vandermonde(c, x, length):
    c, x = (torch.view_as_real(t.resolve_conj()).contiguous() for t in (c, x))
    if forced_backend() == "export":
        return reference.vandermonde(c, x, length)
    return torch.ops.linzoo.vandermonde(c, x, length)


def _cauchy(v, w, nodes):
    v, w = (torch.view_as_real(t.resolve_conj()).contiguous() for t in (v, w))
    if forced_backend() == "export":
        return torch.view_as_complex(reference.cauchy(v, w, nodes))
    return torch.view_as_complex(torch.ops.linzoo.cauchy(v, w, nodes))


def _check(A, B, C, dt, length, P, discretization):
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization: expected one of {', '.join(DISCRETIZATIONS)}, got {discretization!r}")
    if P is not None and discretization != "bilinear":
        raise ValueError(f"discretization: expected 'bilinear' with P, got {discretization!r}")
    if A.dim() != 3 or A.shape[2] != 2:
        raise ValueError(f"A: expected (H, N, 2), got {tuple(A.shape)}")
    expected = {"B": (B, "(H, N, 2)", tuple(A.shape), 3), "dt": (dt, "(H,)", (A.shape[0],), 1)}
    expected["C"] = (C, "(H, N, 2) or (channels, H, N, 2)", tuple(A.shape), 4)
    if P is not None:
        expected["P"] = (P, "(rank, H, N, 2)", tuple(A.shape), 4)
    for name, (tensor, letters, shape, rank) in expected.items():
        fits = tensor.dim() == rank or (name == "C" and tensor.dim() == 3)
        if not fits or tuple(tensor.shape[tensor.dim() - len(shape) :]) != shape:
            raise ValueError(f"{name}: expected {letters} beside A {tuple(A.shape)}, got {tuple(tensor.shape)}")
    if length < 1:
        raise ValueError(f"length: expected a positive number of steps, got {length}")
    for name, tensor in dict(A=A, B=B, C=C, dt=dt, P=P).items():
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != A.device:
            raise RuntimeError(f"{name}: expected on {A.device} as A, got {tensor.device}")


# Registration. Complex numbers are real tensors with a last axis (re, im) here.

torch.library.define("linzoo::vandermonde", "(Tensor c, Tensor x, SymInt length) -> Tensor")
torch.library.define("linzoo::vandermonde_backward", "(Tensor dk, Tensor c, Tensor x) -> (Tensor dc, Tensor dx)")
torch.library.define("linzoo::cauchy", "(Tensor v, Tensor w, Tensor nodes) -> Tensor")
torch.library.define(
    "linzoo::cauchy_backward", "(Tensor dr, Tensor v, Tensor w, Tensor nodes) -> (Tensor dv, Tensor dw)"
)


def _vandermonde_forward(c, x, length):
    if resolve("ssm_kernel", c.device) == "reference":
        return reference.vandermonde(c, x, length).contiguous()
    k = c.new_empty(c.shape[0], length)
    torch.ops.linzoo_cpu.vandermonde_forward(c.contiguous(), x.contiguous(), k)
    return k


def _vandermonde_backward(dk, c, x):
    if resolve("ssm_kernel", c.device) == "reference":
        return reference.vandermonde_backward(dk, c, x)
    dc, dx = c.new_empty(c.shape), x.new_empty(x.shape)
    torch.ops.linzoo_cpu.vandermonde_backward(dk.contiguous(), c.contiguous(), x.contiguous(), dc, dx)
    return dc, dx


def _cauchy_forward(v, w, nodes):
    if resolve("ssm_kernel", v.device) == "reference":
        return reference.cauchy(v, w, nodes).contiguous()
    r = v.new_empty(*v.shape[:2], 2, nodes.shape[0])  # parts apart: lanes are nodes
    torch.ops.linzoo_cpu.cauchy_forward(v.contiguous(), w.contiguous(), nodes.contiguous(), r)
    return r.transpose(2, 3).contiguous()


def _cauchy_backward(dr, v, w, nodes):
    if resolve("ssm_kernel", v.device) == "reference":
        return reference.cauchy_backward(dr.contiguous(), v, w, nodes)
    dv, dw, dr = v.new_empty(v.shape), w.new_empty(w.shape), dr.transpose(2, 3).contiguous()
    torch.ops.linzoo_cpu.cauchy_backward(dr, v.contiguous(), w.contiguous(), nodes.contiguous(), dv, dw)
    return dv, dw


@torch.library.register_fake("linzoo::vandermonde")
def _vandermonde_fake(c, x, length):
    return c.new_empty(c.shape[0], length)


@torch.library.register_fake("linzoo::vandermonde_backward")
def _vandermonde_backward_fake(dk, c, x):
    return c.new_empty(c.shape), x.new_empty(x.shape)


@torch.library.register_fake("linzoo::cauchy")
def _cauchy_fake(v, w, nodes):
    return v.new_empty(*v.shape[:2], nodes.shape[0], 2)


@torch.library.register_fake("linzoo::cauchy_backward")
def _cauchy_backward_fake(dr, v, w, nodes):
    return v.new_empty(v.shape), w.new_empty(w.shape)


def _vandermonde_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _vandermonde_autograd(ctx, dk):
    return *torch.ops.linzoo.vandermonde_backward(dk, *ctx.saved_tensors), None


def _cauchy_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _cauchy_autograd(ctx, dr):
    return *torch.ops.linzoo.cauchy_backward(dr, *ctx.saved_tensors), None


for _name, _forward, _backward, _autograd, _context in (
    ("vandermonde", _vandermonde_forward, _vandermonde_backward, _vandermonde_autograd, _vandermonde_context),
    ("cauchy", _cauchy_forward, _cauchy_backward, _cauchy_autograd, _cauchy_context),
):
    torch.library.impl(f"linzoo::{_name}", "default", _forward)
    torch.library.impl(f"linzoo::{_name}_backward", "default", _backward)
    torch.library.register_autograd(f"linzoo::{_name}", _autograd, setup_context=_context)


@register_flop_formula(torch.ops.linzoo.vandermonde)
def _vandermonde_flops(c, x, length, *, out_shape=None, **kwargs):
    """2 per feature, mode and step: the real part of a complex product."""
    return 2 * c[0] * c[1] * length


@register_flop_formula(torch.ops.linzoo.vandermonde_backward)
def _vandermonde_backward_flops(dk, c, x, *, out_shape=None, **kwargs):
    return 2 * _vandermonde_flops(c, x, dk[1])


@register_flop_formula(torch.ops.linzoo.cauchy)
def _cauchy_flops(v, w, nodes, *, out_shape=None, **kwargs):
    """4 per feature, sum, mode and node: a complex product."""
    return 4 * v[0] * v[1] * v[2] * nodes[0]


@register_flop_formula(torch.ops.linzoo.cauchy_backward)
def _cauchy_backward_flops(dr, v, w, nodes, *, out_shape=None, **kwargs):
    return 2 * _cauchy_flops(v, w, nodes)
