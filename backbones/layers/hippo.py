"""Initial state matrices of state-space layers: HiPPO, its diagonal approximations, and perturb-then-diagonalise.

Everything here is float64 on the CPU, whatever the default device: in float32 the eigenvectors of these matrices are
too inaccurate. Diagonal systems hold one mode of each conjugate pair, unless documented to hold all.
"""

import functools
import math

import torch

CPU = {"dtype": torch.float64, "device": "cpu"}


def hippo_legs(size):
    """HiPPO-LegS (arXiv 2008.07669): A ``(N, N)``, B ``(N,)`` and the P ``(N,)`` that makes A + P P^T normal."""
    n = torch.arange(size, **CPU)
    root = (2 * n + 1).sqrt()
    return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root, (n + 0.5).sqrt()


def hippo_fourier(size):
    """HiPPO-FouT (arXiv 2206.12037), truncated Fourier series on [0, 1]: A, B and P as `hippo_legs`."""
    frequencies = torch.arange(size // 2, **CPU)
    between = torch.stack([torch.zeros_like(frequencies), 2 * math.pi * frequencies], -1).flatten()[1:]
    basis = torch.zeros(size, **CPU)
    basis[::2] = math.sqrt(2)
    basis[0] = 1
    skew = torch.diag(between, -1) - torch.diag(between, 1)
    return skew - 2 * torch.outer(basis, basis), 2 * basis, math.sqrt(2) * basis


MEASURES = {"legs": hippo_legs, "fourier": hippo_fourier}


@functools.cache
def normal_plus_low_rank(measure, size):
    """The normal part of a HiPPO matrix, diagonalised: A = V (diag(Lambda) - (V^* P)(V^* P)^*) V^*.

    Args:
        measure: 'legs' or 'fourier'.
        size: N, even.

    Returns:
        Lambda ``(N/2,)`` with the most negative imaginary part first, V^* P and V^* B ``(N/2,)``, and V ``(N, N/2)``.
        The phases of the modes are arbitrary. They are chosen so that V^* B is real and positive.

    Raises:
        ValueError: the measure is unknown or the size is odd.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
    if size < 2 or size % 2:
        raise ValueError(f"size: expected an even number of states, got {size}")
    A, B, P = MEASURES[measure](size)
    normal = A + torch.outer(P, P)
    decay = normal.diagonal().mean()  # the rest is skew-symmetric
    frequencies, V = torch.linalg.eigh(-1j * (normal - decay * torch.eye(size, **CPU)))
    frequencies, V = frequencies[: size // 2], V[:, : size // 2]
    if measure == "fourier":  # the constant and an idle state at frequency 0 form one conjugate pair
        V[:, -1] = 0
        V[0, -1], V[1, -1] = 0.5**0.5, 0.5**0.5 * 1j
    V = V * torch.sgn(V.mH @ (B + 0j))
    return torch.complex(decay.expand_as(frequencies), frequencies), V.mH @ (P + 0j), V.mH @ (B + 0j), V


def diagonal_system(init, size):
    """Initial values of S4D (arXiv 2206.11893, section 4): modes A and B ``(N/2,)`` for N = `size` real states.

    Args:
        init: 'lin', 'inv', 'inv2', 'quad', 'real' or 'legs'. Imaginary parts are negative for 'legs'.
        size: N, even.

    Raises:
        ValueError: the name is unknown or the size is odd.
    """
    if init == "legs":
        A, _, B, _ = normal_plus_low_rank("legs", size)
        return A, B
    if size < 2 or size % 2:
        raise ValueError(f"size: expected an even number of states, got {size}")
    n = torch.arange(size // 2, **CPU)
    half = torch.full_like(n, -0.5)
    systems = {
        "lin": (half, math.pi * n),
        "inv": (half, size / math.pi * (size / (2 * n + 1) - 1)),
        "inv2": (half, size / math.pi * (size / (n + 1) - 1)),
        "quad": (half, (1 + 2 * n) ** 2 / math.pi),
        "real": (-(n + 1), torch.zeros_like(n)),
    }
    if init not in systems:
        raise ValueError(f"init: expected one of {', '.join([*systems, 'legs'])}, got {init!r}")
    A = torch.complex(*systems[init])
    return A, torch.ones_like(A)


def diagonalise(matrix):
    """Eigenvalues of a real matrix ``(N, N)``, sorted by imaginary, then real part, and eigenvectors of unit norm."""
    values, vectors = torch.linalg.eig(matrix)
    order = sorted(range(len(values)), key=lambda i: (values[i].imag.item(), values[i].real.item()))
    return values[order], vectors[:, order]


@functools.cache
@torch.enable_grad()
def perturb_then_diagonalise(size, gamma=10.0, steps=300):
    """PTD (arXiv 2310.01698, section 4): the eigenvectors of HiPPO-LegS after a small perturbation E.

    LegS itself cannot be diagonalised in any precision: the condition of its eigenvectors grows exponentially. `steps`
    of Adam find E by minimising ``cond(V)^2 + gamma |E|_F``, plus a penalty on modes that grow. They start from
    0.1 P P^T, which leads part of the way to the normal matrix A + P P^T. The result is deterministic.

    Args:
        size: N.
        gamma: Weight of the perturbation's norm.
        steps: Steps of the search.

    Returns:
        Lambda ``(N,)``, all eigenvalues of A + E, sorted by imaginary part; V ``(N, N)``; E ``(N, N)``.
    """
    with torch.device("cpu"):  # the optimizer's own state follows the default device
        A, _, P = hippo_legs(size)
        E = (0.1 * torch.outer(P, P)).requires_grad_()
        optimizer = torch.optim.Adam([E], lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            values, vectors = torch.linalg.eig(A + E)
            singular = torch.linalg.svdvals(vectors)
            growth = (values.real + 0.25).relu().square().sum()
            loss = (singular[0] / singular[-1]) ** 2 + gamma * torch.linalg.matrix_norm(E) + 100 * growth
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    E = E.detach()
    return *diagonalise(A + E), E


def transfer(A, B, C, frequencies):
    """``G(i w) = C (i w - A)^-1 B`` of a dense system, at each of `frequencies`: complex."""
    identity = torch.eye(len(A), **CPU)
    solved = torch.linalg.solve(1j * frequencies[:, None, None] * identity - A, (B + 0j).expand(len(frequencies), -1))
    return solved @ (C + 0j)
