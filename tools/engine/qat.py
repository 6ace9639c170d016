"""Quantisation-aware training: weights that settle are frozen."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.utils import parametrize

from linzoo.quantization.ofq import StatsQ

from .errors import InputError


@HOOKS.register_module()
class AnnealHook(Hook):
    """OFQ's confidence-guided annealing: from epoch `begin` on, only weights near a rounding boundary are trained.

    They are chosen once, at the first step; a resumed run chooses again.

    Args:
        begin: The first such epoch, counted from 0.
        boundary: Weights further than this from a boundary, in steps of the grid, are frozen.

    Raises:
        InputError: no weight of the model is rounded.
    """

    priority = "VERY_HIGH"  # before hooks that average weights

    def __init__(self, begin: int, boundary: float = 0.005):
        self.begin, self.boundary = begin, boundary
        self.frozen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def before_train(self, runner: Runner) -> None:
        """Finds the rounded weights."""
        modules = [m for m in runner.model.modules() if parametrize.is_parametrized(m, "weight")]
        pairs = [(m.parametrizations["weight"].original, m.parametrizations["weight"][0]) for m in modules]
        self.rounded = [(weight, rounding) for weight, rounding in pairs if isinstance(rounding, StatsQ)]
        if not self.rounded:
            raise InputError("AnnealHook: no weight is rounded; expected model.weight_bits")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Decides which weights are frozen."""
        if runner.epoch >= self.begin and not self.frozen:
            self.frozen = [(w, rounding.settled(w, self.boundary), w.detach().clone()) for w, rounding in self.rounded]

    @torch.no_grad()
    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Undoes the optimizer's changes to frozen weights."""
        for weight, settled, value in self.frozen:
            weight.copy_(torch.where(settled, value, weight))
