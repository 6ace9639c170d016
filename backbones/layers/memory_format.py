"""Memory formats for models with four-axis and five-axis parameters."""

from itertools import chain
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

AXES = {torch.channels_last: 4, torch.channels_last_3d: 5}


class AnyMemoryFormat(nn.Module):
    """A module whose `to(memory_format=...)` lays out only the tensors with the format's number of axes.

    PyTorch's own `to` raises if a tensor has five axes and the format is for four, or the other way round.
    """

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Self:
        """As `torch.nn.Module.to`."""
        if args or kwargs:
            super().to(*args, **kwargs)
        if memory_format in AXES:
            for tensor in chain(self.parameters(), self.buffers()):
                if tensor.dim() == AXES[memory_format]:
                    tensor.data = tensor.data.contiguous(memory_format=memory_format)
        return self
