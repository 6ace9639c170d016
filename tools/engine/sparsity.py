"""Training that keeps the zeros of a pruned checkpoint."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from linzoo.backbones.checkpoints import load_plain

from .errors import InputError


@HOOKS.register_module()
class SparseHook(Hook):
    """Sets weights that `linzoo prune` set to 0 back to 0 after every step.

    Args:
        checkpoint: The file from `linzoo prune`.

    Raises:
        InputError: the file cannot be read, comes from another tool, or belongs to another model than the run's.
    """

    priority = "VERY_HIGH"  # before hooks that average weights

    def __init__(self, checkpoint: str):
        try:
            content = load_plain(checkpoint)
        except (OSError, ValueError) as e:
            raise InputError(f"SparseHook: checkpoint={checkpoint!r} cannot be read ({e})") from e
        if "pruning" not in content:
            raise InputError(f"SparseHook: checkpoint={checkpoint!r} is not pruned; expected one of `linzoo prune`")
        self.checkpoint = checkpoint
        self.kept = {name: content["state_dict"][name] != 0 for name in content["pruning"]["names"]}

    def before_train(self, runner: Runner) -> None:
        """Finds the weights in the trained model, wherever it contains the pruned one."""
        found = dict(runner.model.named_parameters())
        self.masks = []
        for name, kept in self.kept.items():
            match = [p for key, p in found.items() if f".{key}".endswith(f".{name}") and p.shape == kept.shape]
            if len(match) != 1:
                raise InputError(f"SparseHook: checkpoint={self.checkpoint!r}: {len(match)} weights are {name!r}")
            self.masks.append((match[0], kept.to(match[0].device)))
        self.after_train_iter(runner, 0)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Undoes the optimizer's changes to pruned weights."""
        for parameter, kept in self.masks:
            parameter.data.mul_(kept)
