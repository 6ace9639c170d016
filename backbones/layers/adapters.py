"""Low-rank adapters as parametrisations of weights: ``W + delta``. They are trained instead of W, and merge exactly."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .haar import haar, inverse_haar

__all__ = ["ADAPTERS", "LoRA", "WaveletLoRA", "adapt", "merge_adapters"]


class LoRA(nn.Module):
    """``W + alpha / rank B A`` (LoRA, arXiv 2106.09685) for a weight ``(..., out, in)``; B starts at 0.

    Args:
        weight: The adapted weight, of a linear map or one per group.
        rank: r.
        alpha: None for `rank`.
    """

    divisor = 1

    def __init__(self, weight: Tensor, rank: int = 4, alpha: float | None = None):
        super().__init__()
        *groups, out, size = weight.shape
        if out % self.divisor or size % self.divisor:
            raise ValueError(f"weight: expected multiples of {self.divisor} features, got {tuple(weight.shape)}")
        self.scale = (rank if alpha is None else alpha) / rank
        self.A = nn.Parameter(weight.new_empty(*groups, rank, size // self.divisor))
        self.B = nn.Parameter(weight.new_empty(*groups, out // self.divisor, rank))
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.A.shape[-1] ** -0.5
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def delta(self) -> Tensor:
        return self.scale * self.B @ self.A

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


class WaveletLoRA(LoRA):
    """WaRA without gains, as a matrix: see `linzoo.backbones.layers.WaRA`. The sizes `in` and `out` must be even."""

    divisor = 2

    def delta(self) -> Tensor:
        size = 2 * self.A.shape[-1]
        eye = torch.eye(size, device=self.A.device, dtype=self.A.dtype)
        low, high = (self.scale * band @ self.A.mT @ self.B.mT for band in haar(eye, -1))
        return inverse_haar(low, high, -1).mT


ADAPTERS: dict[str, type[LoRA]] = {"lora": LoRA, "wara": WaveletLoRA}


def adapt(modules: Iterable[nn.Module], kind: str, rank: int = 4, alpha: float | None = None) -> None:
    """Give the `weight` of each module an adapter, and freeze the weight itself.

    Raises:
        ValueError: there is no such kind; the rank is below 1; nothing to adapt, or odd numbers of features ('wara').
    """
    if kind not in ADAPTERS:
        raise ValueError(f"kind: expected {' or '.join(ADAPTERS)}, got {kind!r}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    made = [(module, ADAPTERS[kind](module.weight, rank, alpha)) for module in modules]
    if not made:
        raise ValueError("modules: expected at least one with a weight, got none")
    for module, adapter in made:
        module.weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", adapter)


def merge_adapters(model: nn.Module) -> None:
    """Merge what adapters learnt into the weights: a plain model again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], LoRA):
            parametrize.remove_parametrizations(module, "weight")


def plain_to_adapted(state: dict[str, Tensor], adapted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain model's state dict under the names of one with parametrised weights; adapters then start at 0."""
    state = dict(state)
    for key in adapted:
        owner, _, inner = key.partition(".parametrizations.weight.")
        if inner == "original" and f"{owner}.weight" in state and key not in state:
            state[key] = state.pop(f"{owner}.weight")
            a, b = (f"{owner}.parametrizations.weight.0.{part}" for part in "AB")
            state |= {a: adapted[a], b: torch.zeros_like(adapted[b])} if a in adapted else {}
    return state
