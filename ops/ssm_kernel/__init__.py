"""Convolution kernels of diagonal and diagonal-plus-low-rank state spaces (S4D, S4)."""

import math

import torch
from torch import Tensor

from ..operator import Operator
from ..tensors import check, promote, state_dtype
from . import cuda, reference

__all__ = ["ssm_kernel"]

DISCRETIZATIONS = ("zoh", "bilinear")


def ssm_kernel(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
    *,
    P: Tensor | None = None,
    discretization: str = "zoh",
) -> Tensor:
    """The convolution kernel ``K_l = C dA^l dB`` of a state space with real output, for l = 0 .. length - 1.

    Complex tensors hold (re, im) on their last axis. Only one mode of each conjugate pair is stored, so every sum over
    modes takes twice its real part.

    Without `P`, S4D (arXiv 2206.11893, section 3): a sum of N exponentials (a Vandermonde product)::

        zoh:       K_l = 2 Re sum_n B_n C_n (exp(dt A_n) - 1) / A_n          exp(l dt A_n)
        bilinear:  K_l = 2 Re sum_n B_n C_n dt / (1 - dt A_n / 2) ((1 + dt A_n / 2) / (1 - dt A_n / 2))^l

    With `P`, S4 (arXiv 2111.00396, algorithm 1): the state matrix is diag(A) - P P^*, discretised bilinearly. Four
    Cauchy products evaluate the kernel's generating function at the roots of unity; an inverse transform follows. `C`
    truncates it at `length`: pass ``C (I - dA^length)`` of the true C. This is computed in float64: modes
    that hardly decay have poles next to the roots of unity, where float32 keeps few digits.

    Args:
        A: Modes ``(H, N, 2)`` of H features, with negative real parts. float64, float32, bfloat16 or float16.
        B: Input projection ``(H, N, 2)``.
        C: Output projection ``(H, N, 2)``, or ``(channels, H, N, 2)`` for several outputs.
        dt: Step sizes ``(H,)``, positive.
        length: Steps L.
        P: Low-rank part ``(rank, H, N, 2)``.
        discretization: 'zoh' or 'bilinear'.

    Returns:
        ``(H, L)``, or ``(channels, H, L)``: float32, or float64 if any input is float64.

    Raises:
        ValueError: a shape does not fit, `length` is not positive, `discretization` is unknown or not bilinear with
            `P`, or tensors lie on different devices.
        TypeError: not a tensor, or a dtype is not supported.
        RuntimeError: a forced backend cannot run it.
    """
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization: expected one of {', '.join(DISCRETIZATIONS)}, got {discretization!r}")
    if P is not None and discretization != "bilinear":
        raise ValueError(f"discretization: expected 'bilinear' with P, got {discretization!r}")
    several = isinstance(C, Tensor) and C.dim() == 4  # c channels
    check(A=(A, "HN2"), B=(B, "HN2"), C=(C, "cHN2" if several else "HN2"), dt=(dt, "H"), P=(P, "RHN2"))
    if length < 1:
        raise ValueError(f"length: expected a positive number of steps, got {length}")
    dtype = state_dtype(promote(*(x for x in (A, B, C, dt, P) if x is not None)))
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
    # The nodes 2 (1 - w) / (1 + w) = 2i tan(angle) are kept as sines and cosines, because the last one is infinite.
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
    # A sum, because packages of AOTInductor fail where complex numbers are subtracted (torch 2.11).
    spectrum = torch.polar(torch.ones_like(angle), angle) * (from_input + -cosine * correction)
    k = torch.fft.irfft(spectrum, n=length)
    return k[0] if squeeze else k


def _expm1(x):
    """``exp(x) - 1`` of complex numbers, without cancellation for small ones."""
    half = (x.imag / 2).sin()
    return torch.complex(torch.expm1(x.real) * x.imag.cos() - 2 * half * half, x.real.exp() * x.imag.sin())


def _vandermonde(c, x, length):
    c, x = (torch.view_as_real(t.resolve_conj()).contiguous() for t in (c, x))
    return _vandermonde_operator(c, x, length)


def _cauchy(v, w, nodes):
    v, w = (torch.view_as_real(t.resolve_conj()).contiguous() for t in (v, w))
    return torch.view_as_complex(_cauchy_operator(v, w, nodes))


# Complex numbers are real tensors with a last axis (re, im) here.


def _kernels(backend):
    return cuda if backend == "cuda" else torch.ops.linzoo_cpu


def _vandermonde_forward(backend, c, x, length):
    k = c.new_empty(c.shape[0], length)
    _kernels(backend).vandermonde_forward(c.contiguous(), x.contiguous(), k)
    return k


def _vandermonde_backward(backend, dk, c, x, length):
    dc, dx = c.new_empty(c.shape), x.new_empty(x.shape)
    _kernels(backend).vandermonde_backward(dk.contiguous(), c.contiguous(), x.contiguous(), dc, dx)
    return [dc, dx]


def _vandermonde_flops(c, length, **_):
    """2 per feature, mode and step: the real part of a complex product."""
    return 2 * c[0] * c[1] * length


_vandermonde_operator = Operator(
    "vandermonde",
    "(Tensor c, Tensor x, SymInt length) -> Tensor k",
    kernel="ssm_kernel",
    reference=reference.vandermonde,
    forward=_vandermonde_forward,
    backward=_vandermonde_backward,
    fake=lambda c, x, length: c.new_empty(c.shape[0], length),
    flops=_vandermonde_flops,
)


def _cauchy_forward(backend, v, w, nodes):
    r = v.new_empty(*v.shape[:2], 2, nodes.shape[0])  # real and imaginary parts apart: SIMD lanes are nodes
    _kernels(backend).cauchy_forward(v.contiguous(), w.contiguous(), nodes.contiguous(), r)
    return r.transpose(2, 3).clone(memory_format=torch.contiguous_format)  # `contiguous` keeps odd strides of one node


def _cauchy_backward(backend, dr, v, w, nodes):
    dv, dw, dr = v.new_empty(v.shape), w.new_empty(w.shape), dr.transpose(2, 3).contiguous()
    _kernels(backend).cauchy_backward(dr, v.contiguous(), w.contiguous(), nodes.contiguous(), dv, dw)
    return [dv, dw]


def _cauchy_flops(v, nodes, **_):
    """4 per feature, sum, mode and node: a complex product."""
    return 4 * v[0] * v[1] * v[2] * nodes[0]


_cauchy_operator = Operator(
    "cauchy",
    "(Tensor v, Tensor w, Tensor nodes) -> Tensor r",
    kernel="ssm_kernel",
    reference=reference.cauchy,
    forward=_cauchy_forward,
    backward=_cauchy_backward,
    fake=lambda v, w, nodes: v.new_empty(*v.shape[:2], nodes.shape[0], 2),
    flops=_cauchy_flops,
    constants=("nodes",),
)
