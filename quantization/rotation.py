"""Orthogonal matrices that spread outliers: Hadamard matrices, and eigenvectors of the channels' covariance (KLT).

Source: MambaQuant, arXiv 2501.13484. A linear map keeps its output if its input and its weight are rotated alike,
``x W^T = (x R) (W R)^T``. All entries of a Hadamard matrix H have the size ``n^-1/2``: each rotated channel takes a
little of every other. With the eigenvectors K of the covariance of x, all channels of ``x K H`` have the same variance.
"""

import functools

import torch
from torch import Tensor

__all__ = ["block_hadamard", "hadamard", "has_hadamard", "klt_rotation", "rotation"]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """``chi(i - j)`` for a prime q: 1 for squares modulo q, -1 for non-squares, 0 on the diagonal."""
    chi = -torch.ones(q, dtype=torch.float64)
    chi[[k * k % q for k in range(1, q)]] = 1
    chi[0] = 0
    index = torch.arange(q)
    return chi[(index[:, None] - index) % q]


def _bordered(q: int, sign: int) -> Tensor:
    """Jacobsthal's matrix below a row of 1 and beside a column of `sign`."""
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0], out[1:, 1:] = 1, sign, _jacobsthal(q)
    return out


@functools.cache
def _signs(n: int) -> Tensor | None:
    """A Hadamard matrix of signs, by Paley's two constructions over primes and Sylvester's doubling."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n == 2:
        return pair
    if n < 1 or n % 4:
        return None
    if _is_prime(n - 1):  # n - 1 = 3 modulo 4
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, -1)
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q, 1), pair) + torch.kron(torch.eye(q + 1, dtype=torch.float64), turned)
    half = _signs(n // 2)
    return None if half is None else torch.kron(pair, half)


def has_hadamard(n: int) -> bool:
    """Whether `hadamard` supports the order `n`."""
    return _signs(n) is not None


def hadamard(n: int) -> Tensor:
    """An orthogonal matrix whose entries all have the size ``n^-1/2``.

    Orders are those that Paley's constructions reach over primes (``q + 1`` with q = 3 modulo 4, ``2 (q + 1)`` with q =
    1 modulo 4), times powers of 2: among others 12, 20, 24, 28, 48, 80, 192, 348, 384, 448, 768.

    Returns:
        ``(n, n)``, float64.

    Raises:
        ValueError: no construction reaches `n`.
    """
    signs = _signs(n)
    if signs is None:
        raise ValueError(f"n: expected an order of a Hadamard matrix by Paley or Sylvester, got {n}")
    return signs * n**-0.5


def rotation(n: int, seed: int = 0) -> Tensor:
    """A Hadamard matrix with random row signs, or a random orthogonal matrix if there is none of this order.

    Returns:
        ``(n, n)``, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    if has_hadamard(n):
        return torch.randint(2, (n, 1), generator=generator) * 2.0 * hadamard(n) - hadamard(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@functools.cache
def block_hadamard(n: int) -> Tensor:
    """Diagonal blocks of Hadamard matrices, of the largest order that divides `n`: for run-time rotations.

    Layers of one width share the tensor, so a file stores it once. Do not write into it.

    Returns:
        ``(n, n)``, float64.
    """
    order = max(k for k in range(1, n + 1) if n % k == 0 and has_hadamard(k))
    return torch.block_diag(*[hadamard(order)] * (n // order))


def klt_rotation(covariance: Tensor, seed: int = 0) -> Tensor:
    """``K H``: a rotation after which all channels have one variance, the mean of the eigenvalues.

    Args:
        covariance: ``(..., n, n)`` of the rows to rotate.
        seed: For the signs of H.

    Returns:
        ``(..., n, n)``, float64, one matrix for each covariance.
    """
    K = torch.linalg.eigh(covariance.double()).eigenvectors
    return K @ rotation(covariance.shape[-1], seed).to(K.device)
