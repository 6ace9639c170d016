"""A recurrence as a Python loop, for autograd, or as one loop of the exported program."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan


def walk(step: Callable, state: tuple | Tensor, xs: Sequence[Tensor], use_scan: bool = False) -> tuple[Tensor, ...]:
    """Outputs of ``step(state, x_t) -> (state, outputs)`` over dimension 1 of `xs`, stacked along it.

    With `use_scan` the loop is one `torch._higher_order_ops.scan`. Then outputs may not be parts of the state: clone
    them.
    """
    if use_scan:
        outputs = scan(step, state, tuple(x.transpose(0, 1) for x in xs), dim=0)[1]
        return tuple(y.transpose(0, 1) for y in outputs)
    outputs = []
    for x in zip(*(x.unbind(1) for x in xs), strict=True):
        state, y = step(state, x)
        outputs.append(y)
    return tuple(torch.stack(y, 1) for y in zip(*outputs, strict=True))
