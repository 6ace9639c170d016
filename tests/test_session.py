"""The session itself: memory that no kernel wrote reads as NaN."""

import pytest
import torch

ALLOCATORS = {
    "empty": lambda: torch.empty(3, 5),
    "empty_like": lambda: torch.empty_like(torch.ones(3, 5)),
    "new_empty": lambda: torch.ones(2).new_empty(3, 5),
    "empty_strided": lambda: torch.empty_strided((3, 5), (1, 3)),
    "bfloat16": lambda: torch.empty(3, 5, dtype=torch.bfloat16),
    "dispatcher": lambda: torch.ops.aten.empty.memory_format([3, 5]),
    "to_empty": lambda: torch.nn.Linear(5, 3, device="meta").to_empty(device="cpu").weight.detach(),
}


@pytest.mark.parametrize("allocate", ALLOCATORS.values(), ids=ALLOCATORS)
def test_unwritten_memory_is_nan(allocate):
    assert allocate().isnan().all()
