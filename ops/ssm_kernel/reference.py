"""The two sums behind the convolution kernels of state spaces, in plain PyTorch: the specification.

Complex numbers have a trailing axis of (re, im), also in `linzoo::vandermonde` and `linzoo::cauchy`. Conjugates are
computed at once, because PyTorch's lazy ones are lost inside an operator that a compiled program calls.
"""

import torch


def vandermonde(c, x, length):
    """``K_l = 2 Re sum_n c_n exp(l x_n)`` for l = 0 .. length - 1: ``(H, N, 2)`` twice to ``(H, length)``."""
    steps = torch.arange(length, dtype=x.dtype, device=x.device)
    powers = torch.exp(torch.view_as_complex(x).unsqueeze(-1) * steps)
    return 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(c), powers).real


def cauchy(v, w, nodes):
    """``R_k = sum_n v_n / (2i s_k - c_k w_n) + v_n^* / (2i s_k - c_k w_n^*)`` at nodes (s_k, c_k).

    ``(H, V, N, 2)``, ``(H, N, 2)`` and ``(K, 2)`` to ``(H, V, K, 2)``.
    """
    v, w = torch.view_as_complex(v), torch.view_as_complex(w)
    return _real(
        torch.einsum("hvn,hnk->hvk", v, 1 / _differences(w, nodes))
        + torch.einsum("hvn,hnk->hvk", v.conj_physical(), 1 / _differences(w.conj_physical(), nodes))
    )


def _differences(w, nodes):
    """``2i s_k - c_k w_n``: ``(H, N, K)``."""
    return torch.complex(torch.zeros_like(nodes[:, 0]), 2 * nodes[:, 0]) - w.unsqueeze(-1) * nodes[:, 1]


def _real(x):
    return torch.view_as_real(x).contiguous()
