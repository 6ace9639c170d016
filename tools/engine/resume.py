"""A resumed run continues exactly like the uninterrupted one, or says which settings it does not follow."""

import ast
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from linzoo.backbones.checkpoints import load_plain

from .errors import InputError, note

# Settings that determine what a run computes.
DECISIVE = (
    *("model", "data_preprocessor", "optim_wrapper", "param_scheduler", "train_dataloader", "val_dataloader"),
    *("train_cfg", "val_evaluator", "default_hooks", "custom_hooks", "randomness", "auto_scale_lr", "sync_bn"),
)
# Settings that always come from the checkpoint, whatever the config says.
KEPT = ("optim_wrapper.optimizer.", "param_scheduler", "randomness.seed")
# Settings that must not change, because the checkpoint's state would not fit.
FIXED = (
    *("optim_wrapper.optimizer.type", "optim_wrapper.constructor", "optim_wrapper.paramwise_cfg"),
    *("train_cfg.type", "train_cfg.by_epoch", "model.backbone.frozen_stages"),
)


def latest_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The checkpoint to resume from, or None if this run has written none.

    `last_checkpoint` names it. Its folder is ignored, because a work dir may have been moved. If the name or its
    checkpoint is incomplete (a full disk, an interrupted copy), the newest complete checkpoint is used, with a note.
    """
    pointer = Path(work_dir, "last_checkpoint")
    if not pointer.exists():
        return None
    named = pointer.with_name(Path(pointer.read_text().strip() or "torn").name)
    found = {path for kind in ("epoch", "iter") for path in pointer.parent.glob(f"{kind}_*.pth")}
    for path in [named] * named.is_file() + sorted(found - {named}, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            load_plain(path, mmap=True)
        except ValueError as e:
            note(f"{e}; the one before it is looked for")
        else:
            return path
    return None


def _plain(node: ast.expr) -> Any:
    """The value of an expression in a dumped config, without running it."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
        named = {keyword.arg: _plain(keyword.value) for keyword in node.keywords}
        return {key: value for part in map(_plain, node.args) for key, value in part.items()} | named
    if isinstance(node, ast.Dict):
        return {_plain(key): _plain(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _flat(text: str) -> dict[str, Any]:
    """Every decisive setting in a dumped config, by its dotted name."""
    found = {}

    def walk(node: Any, path: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            walk(value, f"{path}.{key}")
        if not items:
            found[path] = node

    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and line.targets[0].id in DECISIVE:
            walk(_plain(line.value), line.targets[0].id)
    return found


def changed_settings(cfg: Config, path: Path) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between a config and the one a checkpoint was written with: `{name: (old, new)}`."""
    text = load_plain(path, mmap=True).get("meta", {}).get("cfg")
    if not text:
        return {}
    old, new = _flat(text), _flat(cfg.pretty_text)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return {name: (old.get(name), new.get(name)) for name in names}


def refuse_what_cannot_be_resumed(cfg: Config, path: Path) -> None:
    """Names every setting that changed since a checkpoint was written, and which value is used.

    Raises:
        InputError: the optimizer, its parameter groups or the kinds of schedules changed.
    """
    changed = changed_settings(cfg, path)
    for name, (old, new) in changed.items():
        schedule = name.startswith("param_scheduler") and (name.endswith(".type") or name.count(".") < 2)
        averaging = "hooks" in name and name.endswith(".type") and "EMA" in f"{old}{new}"
        if name.startswith(FIXED) or schedule or averaging:
            raise InputError(
                f"--resume: {name} is {new!r} and was {old!r} when {str(path)!r} was written, which cannot go on so; "
                f"expected {old!r}, or a run of its own with load_from={str(path)!r}"
            )
    for name, (old, new) in changed.items():
        kept = name.startswith(KEPT)
        note(f"--resume: {name} is {new!r} and was {old!r}: {old if kept else new!r} is used")


@HOOKS.register_module()
class ResumeHook(Hook):
    """Derives every epoch's random stream from (seed, epoch, rank), and repeats a validation that was interrupted.

    Before each epoch it seeds Python, NumPy and torch (all devices). This fixes what the epoch draws: drop path, mixup,
    and the base seed from which the data loader seeds its workers. (The sampler orders the data by seed and epoch
    itself.) A resumed epoch draws the same numbers on every rank, and nothing needs to be stored.
    """

    priority = "VERY_LOW"

    def before_train(self, runner: Runner) -> None:
        """Validates the resumed epoch if its checkpoint was written before its validation."""
        loop, epoch = runner.train_loop, runner.epoch
        done = runner.message_hub.runtime_info.get("last_validation", 0)
        due = epoch >= loop.val_begin and (epoch % loop.val_interval == 0 or epoch == loop.max_epochs)
        if runner.val_loop is not None and epoch > done and due:
            runner.val_loop.run()

    def before_val_epoch(self, runner: Runner) -> None:
        """Marks this epoch as validated in the checkpoint that the validation's own hooks may write."""
        if isinstance(runner._train_loop, BaseLoop):
            runner.message_hub.update_info("last_validation", runner.epoch)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds this epoch."""
        seed = np.random.SeedSequence([runner.seed, runner.epoch, runner.rank])
        for_python, for_numpy, for_torch = (int(x) for x in seed.generate_state(3))
        random.seed(for_python)
        np.random.seed(for_numpy)
        torch.manual_seed(for_torch)
        if hasattr(dataset := runner.train_dataloader.dataset, "set_epoch"):
            dataset.set_epoch(runner.epoch)
