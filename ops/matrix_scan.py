"""Arguments and results of the CPU kernels in `matrix_scan.h`, for the operators that have one."""

import torch

from .operator import CHUNK
from .tensors import dense_rows


def empty(k, v, save):
    """Output and last state ``(B, L + K, H, P)``, which are one tensor because an operator has one differentiable
    result; and the states before each chunk of CHUNK steps ``(B, H, chunks, K, P)``, empty if none are kept.
    """
    batch, length, heads, values = v.shape
    states = (batch, heads, (length + CHUNK["cpu"] - 1) // CHUNK["cpu"], k.shape[3], values)
    kept = save and v.device.type == "cpu"
    return v.new_empty(batch, length + k.shape[3], heads, values), v.new_empty(states if kept else (0,))


def forward(op, save, **inputs):
    """Output and states of operator `op`'s kernel for q, k ``(B, L, H, K)``, v, g, beta and initial."""
    inputs = _dense(**inputs)
    packed, states = empty(inputs["k"], inputs["v"], save)
    getattr(torch.ops.linzoo_cpu, f"{op}_forward")(**inputs, packed=packed, states=states)
    return packed, states


def backward(op, dpacked, states, **inputs):
    """Gradients of the inputs that are not None. Without states it runs the forward pass again."""
    if states.dim() == 1:
        states = forward(op, True, **inputs)[1]
    inputs = _dense(**inputs)
    grads = {f"d{name}": None if x is None else x.new_empty(x.shape) for name, x in inputs.items()}
    kernel = getattr(torch.ops.linzoo_cpu, f"{op}_backward")
    kernel(dpacked=dpacked.contiguous(), **inputs, states=states, **grads)
    return [x for x in grads.values() if x is not None]


def _dense(**tensors):
    """All contiguous, except that the heads' rows in `q`, `k` and `v` may have any stride."""
    rows = {name: dense_rows(tensors.pop(name)) for name in "qkv"}
    return rows | {name: None if x is None else x.contiguous() for name, x in tensors.items()}
