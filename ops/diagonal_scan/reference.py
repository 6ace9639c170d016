"""The complex diagonal recurrence in plain PyTorch: the specification. Autograd gives its gradients."""

import torch

from ..tensors import state_dtype
from ..walk import walk


def diagonal_scan(a, b, initial=None, reverse=False):
    """`linzoo.ops.diagonal_scan` for b ``(B, L, M, 2)``, a ``(M, 2)`` or ``(B, L, M, 2)``, initial ``(B, M, 2)``."""
    a, inputs = _complex(a), _complex(b)
    steps = range(b.shape[1] - 1, -1, -1) if reverse else range(b.shape[1])
    h = torch.zeros_like(inputs[:, 0]) if initial is None else _complex(initial)
    states = [None] * b.shape[1]
    for t in steps:
        h = (a if a.dim() == 1 else a[:, t]) * h + inputs[:, t]
        states[t] = h
    return torch.view_as_real(torch.stack(states, 1)).to(b.dtype)


def looped(a, b, initial=None, reverse=False):
    """`diagonal_scan` as one loop of an exported program, in real numbers: ONNX has few operations on complex ones."""
    dtype = state_dtype(b.dtype)
    a, inputs = a.to(dtype), b.to(dtype)
    xs = (inputs,) if a.dim() == 2 else (inputs, a)

    def step(h, x):
        b_t, a_t = x if len(x) == 2 else (*x, a)
        re = a_t[..., 0] * h[..., 0] - a_t[..., 1] * h[..., 1]
        im = a_t[..., 0] * h[..., 1] + a_t[..., 1] * h[..., 0]
        h = torch.stack([re, im], -1) + b_t
        return h, (h,)

    start = torch.zeros_like(inputs[:, 0]) if initial is None else initial.to(dtype)
    [h] = walk(step, start, tuple(x.flip(1) for x in xs) if reverse else xs, use_scan=True)
    return (h.flip(1) if reverse else h).to(b.dtype)


def inputs_of(a, h, initial=None, reverse=False, **_):
    """The inputs b that give the states `h`: the recurrence, solved for b."""
    start = torch.zeros_like(h[:, :1]) if initial is None else initial.unsqueeze(1).to(h.dtype)
    before = torch.cat([h[:, 1:], start] if reverse else [start, h[:, :-1]], 1)
    return (torch.view_as_real(_complex(h) - _complex(a) * _complex(before))).to(h.dtype)


def _complex(x):
    return torch.view_as_complex(x.to(state_dtype(x.dtype)).contiguous())
