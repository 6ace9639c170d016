"""A resumed run continues exactly as the uninterrupted one."""

import random

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop


@HOOKS.register_module()
class ResumeHook(Hook):
    """Every epoch's random stream follows from (seed, epoch, rank); a validation that a kill cut off is made up for.

    Seeding Python, NumPy and torch (all devices) before an epoch fixes what it draws: drop path, mixup, and the base
    seed from which the data loader seeds its workers. (The sampler orders the data by seed and epoch itself.) So a
    resumed epoch draws what it would have drawn, on every rank, with nothing to store.
    """

    priority = "VERY_LOW"

    def before_train(self, runner):
        """Validate the resumed epoch where its checkpoint was written before its validation had been done."""
        loop, epoch = runner.train_loop, runner.epoch
        done = runner.message_hub.runtime_info.get("last_validation", 0)
        due = epoch >= loop.val_begin and (epoch % loop.val_interval == 0 or epoch == loop.max_epochs)
        if runner.val_loop is not None and epoch > done and due:
            runner.val_loop.run()

    def before_val_epoch(self, runner):
        """Note for the checkpoint that the validation's own hooks may write: this epoch is validated in it."""
        if isinstance(runner._train_loop, BaseLoop):
            runner.message_hub.update_info("last_validation", runner.epoch)

    def before_train_epoch(self, runner):
        """Seed this epoch."""
        seed = np.random.SeedSequence([runner.seed, runner.epoch, runner.rank])
        for_python, for_numpy, for_torch = (int(x) for x in seed.generate_state(3))
        random.seed(for_python)
        np.random.seed(for_numpy)
        torch.manual_seed(for_torch)
