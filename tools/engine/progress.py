"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import atexit
import logging
import sys
import time
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .curves import best_metric

COLUMNS = (
    "epoch {task.fields[epoch]}",
    "loss {task.fields[loss]:.4f}",
    "lr {task.fields[lr]:.1e}",
    "{task.fields[images]:.0f} images/s",
    "{task.fields[score]}",
)


@HOOKS.register_module()
class ProgressHook(Hook):
    """Records images/s for the log. On a terminal, a live bar and a line per epoch replace the log's lines.

    Only the main process shows anything. The log file has every line either way.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self):
        self.bar = self.clock = None

    def before_train(self, runner: Runner) -> None:
        """Start the bar on a terminal."""
        if not (is_main_process() and sys.stdout.isatty()):
            return
        for handler in runner.logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
        self.bar = Progress(
            BarColumn(bar_width=8),
            *(TextColumn(column) for column in COLUMNS),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(),
        )
        self.task = self.bar.add_task(
            "",
            total=runner.max_iters,
            completed=runner.iter,
            epoch=f"{runner.epoch}/{runner.max_epochs}",
            loss=float("nan"),
            lr=0.0,
            images=0.0,
            score="",
        )
        self.bar.start()
        atexit.register(self.bar.stop)  # an error must not leave the terminal without its cursor

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Start the clock at the first batch of an epoch; loading it counts from then on."""
        if batch_idx == 0 or self.clock is None:
            self.clock = time.perf_counter()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Record images/s over all processes and move the bar."""
        now = time.perf_counter()
        images = len(data_batch["inputs"]) * get_world_size() / (now - self.clock)
        self.clock = now
        runner.message_hub.update_scalar("train/images_per_s", images)
        if self.bar is None:
            return
        mean = {name: runner.message_hub.get_scalar(f"train/{name}").mean(20) for name in ("loss", "images_per_s")}
        self.bar.update(
            self.task,
            completed=runner.iter + 1,
            epoch=f"{runner.epoch + 1}/{runner.max_epochs}",
            loss=mean["loss"],
            images=mean["images_per_s"],
            lr=runner.message_hub.get_scalar("train/lr").current(),
        )

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Print the epoch's line."""
        metric = best_metric(runner)
        if self.bar is None or metric is None or not metrics or metric not in metrics:
            return
        score = f"{metric.rpartition('/')[2]} {metrics[metric]:.2f}"
        self.bar.update(self.task, score=score)
        loss = runner.message_hub.get_scalar("train/loss").mean(len(runner.train_dataloader))
        self.bar.console.print(f"epoch {runner.epoch}/{runner.max_epochs}  loss {loss:.4f}  {score}")

    def after_train(self, runner: Runner) -> None:
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
