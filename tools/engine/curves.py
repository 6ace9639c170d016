"""The training curves of a run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from mmengine.dist import master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from .files import write_atomically


def best_metric(runner: Runner) -> str | None:
    """The validation metric of a run: the first in `save_best` of its checkpoint hook."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            return next(iter(getattr(hook, "key_indicators", ())), None)  # "auto" until the first validation
    return None


@HOOKS.register_module()
class CurveHook(Hook):
    """After training, draws loss, learning rate and validation metric over the epochs in `work_dir/curves.png`.

    The histories are in mmengine's message hub, and so in every checkpoint: a resumed run has complete curves.
    """

    priority = "LOWEST"

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Draw the picture."""
        scalars = {name: buffer.data[0] for name, buffer in runner.message_hub.log_scalars.items()}
        per_epoch = len(runner.train_dataloader)
        interval = runner.val_interval / (per_epoch if isinstance(runner.train_loop, IterBasedTrainLoop) else 1)
        metric = best_metric(runner)
        figure = Figure(figsize=(13, 3.6), layout="constrained")
        for axis, name, label in zip(
            figure.subplots(1, 3),
            ("train/loss", "train/lr", f"val/{metric}"),
            ("loss", "learning rate", metric),
            strict=True,
        ):
            values = scalars.get(name, [])
            every = interval if name.startswith("val/") else 1 / per_epoch
            steps = [step * every for step in range(1, len(values) + 1)]
            axis.plot(steps, values, marker="." if name.startswith("val/") else None, linewidth=1)
            axis.set(xlabel="epoch", title=label)
            axis.grid(alpha=0.3)
        file = Path(runner.work_dir, "curves.png")
        write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=120))
