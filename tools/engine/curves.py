"""The training curves of a run as a picture."""

from pathlib import Path

import matplotlib
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


@HOOKS.register_module()
class CurveHook(Hook):
    """After training, draws loss, learning rate and validation metric over the epochs in `work_dir/curves.png`.

    The histories live in mmengine's message hub, hence in every checkpoint: the curves of a resumed run are whole.

    Args:
        metric: the validation metric to draw.
    """

    priority = "LOWEST"

    def __init__(self, metric: str = "accuracy/top1"):
        self.metric = metric

    @master_only
    def after_train(self, runner):
        """Draw the picture."""
        scalars = {name: buffer.data[0] for name, buffer in runner.message_hub.log_scalars.items()}
        per_epoch = len(runner.train_dataloader)
        interval = runner.val_interval / (per_epoch if isinstance(runner.train_loop, IterBasedTrainLoop) else 1)
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for axis, name, label in zip(
            axes, ("train/loss", "train/lr", f"val/{self.metric}"), ("loss", "learning rate", self.metric), strict=True
        ):
            values = scalars.get(name, [])
            if name.startswith("val/"):
                steps = [step * interval for step in range(1, len(values) + 1)]
            else:
                steps = [step / per_epoch for step in range(1, len(values) + 1)]
            axis.plot(steps, values, marker="." if name.startswith("val/") else None, linewidth=1)
            axis.set(xlabel="epoch", title=label)
            axis.grid(alpha=0.3)
        figure.savefig(Path(runner.work_dir, "curves.png"), dpi=120)
        plt.close(figure)
