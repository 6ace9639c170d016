"""The complex diagonal recurrence in plain PyTorch: the specification."""

import torch

from ..selective_scan.reference import state_dtype


def diagonal_scan(a, b, initial=None, reverse=False):
    """`linzoo.ops.diagonal_scan` of b ``(B, L, M, 2)``; a ``(M, 2)`` or ``(B, L, M, 2)``, initial ``(B, M, 2)``."""
    a, inputs = _complex(a), _complex(b)
    steps = range(b.shape[1] - 1, -1, -1) if reverse else range(b.shape[1])
    h = torch.zeros_like(inputs[:, 0]) if initial is None else _complex(initial)
    states = [None] * b.shape[1]
    for t in steps:
        h = (a if a.dim() == 1 else a[:, t]) * h + inputs[:, t]
        states[t] = h
    return torch.view_as_real(torch.stack(states, 1)).to(b.dtype)


def diagonal_scan_backward(dh, a, h, initial=None, reverse=False):
    """Gradients of `diagonal_scan`, given its output `h`: of a, b and initial (None where that is None).

    The gradient of b is the scan of the output's gradient the other way, by the conjugate of `a` one step later.
    """
    dtype, constant = h.dtype, a.dim() == 2
    a, dh, h = _complex(a), _complex(dh), _complex(h)
    last = 0 if reverse else h.shape[1] - 1
    steps = range(h.shape[1]) if reverse else range(h.shape[1] - 1, -1, -1)
    g, gs, das = torch.zeros_like(h[:, 0]), [None] * h.shape[1], [None] * h.shape[1]
    for t in steps:
        after = t - 1 if reverse else t + 1
        carry = 0 if t == last else (a if constant else a[:, after]).conj_physical() * g
        g = gs[t] = dh[:, t] + carry
        before = t + 1 if reverse else t - 1
        if 0 <= before < h.shape[1]:
            previous = h[:, before]
        else:
            previous = torch.zeros_like(g) if initial is None else _complex(initial)
        das[t] = g * previous.conj_physical()
    da, db = torch.stack(das, 1), torch.stack(gs, 1)
    da = torch.view_as_real(da.sum((0, 1)) if constant else da)
    first = -1 if reverse else 0
    a_first = a if constant else a[:, first]
    dinitial = None if initial is None else torch.view_as_real(a_first.conj_physical() * gs[first])
    return da, torch.view_as_real(db).to(dtype), None if dinitial is None else dinitial.to(initial.dtype)


def _complex(x):
    return torch.view_as_complex(x.to(state_dtype(x.dtype)).contiguous())
