"""Compares the backend in use with the reference on a tiny input. `linzoo doctor` runs this."""

import torch

from .backend import use_backend
from .causal_conv1d import causal_conv1d
from .deform_conv import deform_conv
from .depthwise_conv2d import depthwise_conv2d
from .diagonal_scan import diagonal_scan
from .gated_delta import gated_delta
from .mlstm import mlstm
from .rational import rational
from .scan_order import cross
from .selective_scan import selective_scan
from .ssd import ssd_state
from .ssm_kernel import ssm_kernel
from .wkv import bi_wkv, wkv6, wkv7


def _selective_scan(normal):
    B, H, W, G, D, N, R = 2, 5, 7, 4, 19, 3, 2
    inputs = dict(u=normal(B, H * W, G, D), dt=normal(B, H * W, G, R), A=-normal(G, D, N).abs() - 0.1)
    inputs |= dict(B=normal(B, H * W, G, N), C=normal(B, H * W, G, N), D=normal(G, D))
    inputs |= dict(dt_weight=normal(G, D, R), dt_bias=normal(G, D) - 3)
    return lambda **x: selective_scan(**x, order=cross(H, W, x["u"].device)), inputs


def _causal_conv1d(normal):
    B, H, W, G, C = 2, 5, 7, 4, 19
    inputs = dict(x=normal(B, H * W, G, C), weight=normal(G, C, 4), bias=normal(G, C))
    return lambda **x: causal_conv1d(**x, order=cross(H, W, x["x"].device), activation="silu"), inputs


def _deform_conv(normal):
    B, H, W, G, D = 2, 5, 7, 3, 19
    inputs = dict(x=normal(B, H, W, G * D), offset=normal(B, H, W, G, 9, 2), weight=normal(B, H, W, G, 9))
    return lambda **x: deform_conv(**x), inputs


def _rational(normal):
    inputs = dict(x=normal(9, 24), numerator=normal(1, 6), denominator=normal(8, 4))
    return lambda **x: rational(**x), inputs


def _depthwise_conv2d(normal):
    inputs = dict(x=normal(2, 9, 11, 19), weight=normal(19, 3, 5), bias=normal(19))
    return lambda **x: depthwise_conv2d(**x, padding=(3, 2), dilation=2), inputs


def _diagonal_scan(normal):
    inputs = dict(a=0.5 * normal(19, 2).tanh(), b=normal(2, 33, 3, 19, 2), initial=normal(2, 3, 19, 2))
    return lambda **x: diagonal_scan(**x, reverse=True), inputs


def _gated_delta(normal):
    B, L, H, K, P = 2, 37, 3, 7, 19
    inputs = dict(q=normal(B, L, H, K), k=normal(B, L, H, K) / K**0.5, v=normal(B, L, H, P))
    inputs |= dict(g=-normal(B, L, H).abs(), beta=normal(B, L, H), initial=normal(B, H, K, P))

    def run(beta, **x):
        y, state = gated_delta(beta=beta.sigmoid(), **x)
        return torch.cat([y.flatten(), state.flatten()])

    return run, inputs


def _mlstm(normal):
    B, L, H, P = 2, 37, 3, 19
    inputs = {name: normal(B, L, H, P) for name in "qkv"} | {name: normal(B, L, H) for name in "if"}

    def run(i, f, **x):
        narrow = {name: t[..., :16].contiguous() for name, t in x.items()}  # CUDA reads these rows four at a time
        return torch.cat([mlstm(**x, i=i, f=f), mlstm(**narrow, i=i, f=f)], 3)

    return run, inputs


def _ssd(normal):
    batch, L, H, P, G, N = 2, 37, 4, 19, 2, 7
    inputs = dict(x=normal(batch, L, H, P), dt=normal(batch, L, H), A=normal(H), D=normal(H))
    inputs |= {name: normal(batch, L, G, N) / N**0.5 for name in "BC"} | dict(initial=normal(batch, H, P, N))

    def run(dt, A, **x):
        y, state = ssd_state(dt=dt.sigmoid(), A=-A.exp(), **x)
        return torch.cat([y.flatten(), state.flatten()])

    return run, inputs


def _ssm_kernel(normal):
    A = normal(3, 9, 2) * torch.tensor([0.3, 5.0]) - torch.tensor([1.0, 0.0])
    inputs = dict(A=A, B=normal(3, 9, 2), C=normal(2, 3, 9, 2), dt=0.1 * normal(3).exp(), P=0.3 * normal(1, 3, 9, 2))

    def run(A, B, C, dt, P):
        kernels = ssm_kernel(A, B, C, dt, 45), ssm_kernel(A, B, C, dt, 45, P=P, discretization="bilinear")
        return torch.cat(kernels)

    return run, inputs


def _wkv(normal):
    B, L, H, N = 2, 37, 3, 19
    inputs = {name: normal(B, L, H, N) for name in ("r", "k", "v", "w", "a", "b")} | dict(u=normal(H, N))

    def run(r, k, v, w, u, a, b):
        flat = [x.flatten(-2) for x in (k, v, w[0, 0], u)]
        states = wkv6(r, k, v, w, u), wkv7(r, w, k, v, a / N, b)
        return torch.cat([bi_wkv(*flat), *(y.flatten(-2) for y in states)])

    return run, inputs


EXAMPLES = {
    "causal_conv1d": _causal_conv1d,
    "deform_conv": _deform_conv,
    "depthwise_conv2d": _depthwise_conv2d,
    "diagonal_scan": _diagonal_scan,
    "gated_delta": _gated_delta,
    "mlstm": _mlstm,
    "rational": _rational,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "ssm_kernel": _ssm_kernel,
    "wkv": _wkv,
}


def self_check(op, device="cpu"):
    """Largest error of operator `op`'s output and gradients on `device`, relative to the reference's largest values.

    Returns:
        A float: about 1e-6 in float32 if all is well; infinite if a value is not finite.

    Raises:
        ValueError: there is no such operator.
    """
    if op not in EXAMPLES:
        raise ValueError(f"op: expected one of {', '.join(EXAMPLES)}, got {op!r}")
    generator = torch.Generator().manual_seed(0)
    run, inputs = EXAMPLES[op](lambda *shape: torch.randn(shape, generator=generator))
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs.items()}

    def results():
        y = run(**inputs)
        return [y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))]

    ours = results()
    with use_backend("reference"):
        expected = results()
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
