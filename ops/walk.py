"""A recurrence as a Python loop, for autograd, or as one loop of the exported program."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan


def walk(step: Callable, state: tuple | Tensor, xs: Sequence[Tensor], use_scan: bool = False) -> tuple[Tensor, ...]:
    """Outputs of ``step(state, x_t) -> (state, outputs)`` over dimension 1 of `xs`, stacked along it.

    With `use_scan` the loop is one `torch._higher_order_ops.scan`.
    """
    if use_scan:

        def apart(state, x):  # scan forbids outputs that are parts of the state
            state, outputs = step(state, x)
            return state, tuple(y.clone() for y in outputs)

        outputs = scan(apart, state, tuple(x.transpose(0, 1) for x in xs), dim=0)[1]
        return tuple(y.transpose(0, 1) for y in outputs)
    outputs = []
    for x in zip(*(x.unbind(1) for x in xs), strict=True):
        state, y = step(state, x)
        outputs.append(y)
    return tuple(torch.stack(y, 1) for y in zip(*outputs, strict=True))
