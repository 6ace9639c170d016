#!/usr/bin/env python
"""Perturbs an input by a Fourier mode; prints how far S4D and the PTD layers are from the system they approximate.

S4D-LegS and S5 drop a part of HiPPO-LegS to become diagonal. Perturb-then-diagonalise (PTD, arXiv 2310.01698) adds a
small matrix E instead. S4D's transfer function has spikes, which more states make narrower but not lower. PTD's is
within (2 ln N + 4) |E| of LegS everywhere, to first order. All systems start with the same random real C and read the
same input, a decaying exponential plus a cosine. They are compared with LegS itself, run with a dense matrix.
"""

import argparse
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from linzoo.backbones.layers import S4D, S5, hippo

DT = 1e-4  # seconds between samples; LegS with 64 states has rates up to 64


def layers(size: int, C: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layers by name, in float64, with one feature, each for its system ``(A, B_legs, C)``."""
    _, B, _ = hippo.hippo_legs(size)
    _, _, b, V = hippo.normal_plus_low_rank("legs", size)
    _, W, _ = hippo.perturb_then_diagonalise(size)
    inverse = torch.linalg.solve(W, B + 0j)
    made = {}
    # For S4D the theory uses half of LegS's B (arXiv 2206.11893, theorem 3); PTD's kernels hold all modes, not half.
    for name, init, parameter in (("S4D-LegS", "legs", C @ V / 2), ("S4-PTD", "ptd", C @ W / 2)):
        layer = S4D(1, size, init=init, dtype=torch.float64)
        layer.kernel[0].C.copy_(torch.view_as_real(parameter))
        layer.kernel[0].log_dt.fill_(math.log(DT))
        made[name] = lambda u, kernel=layer.kernel[0]: convolve(kernel(len(u))[0, 0], u)
    for name, init, column, row in (("S5", "legs", b / 2, C @ V), ("S5-PTD", "ptd", inverse, C @ W)):
        layer = S5(1, size, init=init, dtype=torch.float64)
        layer.B.copy_(torch.view_as_real(column).unsqueeze(1))
        layer.C.copy_(torch.view_as_real(row).unsqueeze(0))
        layer.log_step.fill_(math.log(DT))
        layer.D.zero_()
        made[name] = lambda u, layer=layer: layer(u.view(1, -1, 1)).flatten()
    return made


def convolve(k: Tensor, u: Tensor) -> Tensor:
    """Causal convolution of two signals of equal length."""
    size = 2 * len(u)
    return torch.fft.irfft(torch.fft.rfft(k, size) * torch.fft.rfft(u, size), size)[: len(u)]


def legs(size: int, C: Tensor, u: Tensor) -> Tensor:
    """LegS's output for `u`, held between samples: its dense recurrence."""
    A, B, _ = hippo.hippo_legs(size)
    step = torch.linalg.matrix_exp(DT * A)
    into = torch.linalg.solve(A, (step - torch.eye(size, dtype=A.dtype)) @ B)
    x, y = torch.zeros_like(B), torch.empty_like(u)
    for t, value in enumerate(u):
        x = step @ x + into * value
        y[t] = C.real @ x
    return y


def spike(size: int, C: Tensor) -> float:
    """The frequency (radians per second) at which S4D's transfer function is farthest from that of LegS."""
    A, B, P = hippo.hippo_legs(size)
    omega = torch.logspace(0, math.log10(size**2), 2000, dtype=torch.float64)
    off = hippo.transfer(A + torch.outer(P, P), B / 2, C.real, omega) - hippo.transfer(A, B, C.real, omega)
    return omega[off.abs().argmax()].item()


@torch.no_grad()
def errors(size: int, steps: int = 40000, amplitude: float = 1.0, seed: int = 0) -> tuple[float, float, dict]:
    """The mode's frequency, and each layer's error on the plain and on the perturbed input.

    Args:
        size: N, states.
        steps: Samples of the input, `DT` seconds apart.
        amplitude: Of the Fourier mode.
        seed: Of C.

    Returns:
        The frequency, |E|, and ``{name: (plain, perturbed)}``: root mean squares of the difference to LegS's output,
        divided by that of LegS's output for the plain input.
    """
    C = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0j
    omega, t = spike(size, C), DT * torch.arange(steps, dtype=torch.float64)
    plain = torch.exp(-t)
    inputs = plain, plain + amplitude * torch.cos(omega * t)
    expected = [legs(size, C, u) for u in inputs]
    scale = expected[0].square().mean().sqrt()
    found = {
        name: tuple(
            ((layer(u) - y).square().mean().sqrt() / scale).item() for u, y in zip(inputs, expected, strict=True)
        )
        for name, layer in layers(size, C).items()
    }
    return omega, torch.linalg.matrix_norm(hippo.perturb_then_diagonalise(size)[2], 2).item(), found


def main(argv: list[str] | None = None) -> None:
    """Command line of `ptd`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, nargs="+", default=[16, 32, 64], metavar="N")
    parser.add_argument("--amplitude", type=float, default=1.0, help="of the Fourier mode; the plain input starts at 1")
    args = parser.parse_args(argv)
    table = Table(title="error to LegS's output, in multiples of it: plain input -> with a Fourier mode")
    names = ("S4D-LegS", "S5", "S4-PTD", "S5-PTD")
    for heading in ("N", "mode, rad/s", "|E|", *names, "S4D-LegS / S4-PTD"):
        table.add_column(heading, justify="right")
    for size in args.states:
        omega, perturbation, found = errors(size, amplitude=args.amplitude)
        cells = ["{:.4f} -> {:.4f}".format(*found[name]) for name in names]
        ratio = found["S4D-LegS"][1] / found["S4-PTD"][1]
        table.add_row(f"{size}", f"{omega:.1f}", f"{perturbation:.2f}", *cells, f"{ratio:.1f}x")
    Console(width=None if Console().is_terminal else 150).print(table)


if __name__ == "__main__":
    main()
