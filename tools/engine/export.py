"""Exports the best model of a run in a format that timm loads."""

import copy
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from linzoo.backbones.layers.adapters import merge_adapters
from linzoo.quantization.ofq import settle_weights

from .curves import best_metric
from .task import TimmModel
from .weights import load_weights

FOLDER = "export"


@HOOKS.register_module()
class ExportHook(Hook):
    """After training, writes `work_dir/export/{model.safetensors,config.json}`.

    The folder has timm's exchange format: `timm.create_model("local-dir:work_dir/export", pretrained=True)`, or only
    the weights by `pretrained_cfg_overlay=dict(file=".../model.safetensors", num_classes=K)` (without the number, timm
    takes the head for ImageNet's and drops it). `config.json` has the model's name, its class names, input size, mean
    and std, the training config and the best value of the metric, under the last part of its name. The weights are
    those of the best validation (the averaged ones if the run averages), else the last. A model of another package,
    around a backbone, is not exported.
    """

    priority = "LOWEST"

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Writes the export."""
        info = runner.message_hub.runtime_info
        source = info.get("best_ckpt", info.get("last_ckpt"))
        trained = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if source is None or not isinstance(trained, TimmModel):
            return
        best = copy.copy(trained)
        best._modules = {**trained._modules, "model": copy.deepcopy(trained.model)}
        # After a work dir was moved, the message hub still has its old path.
        classes = load_weights(best.model, Path(runner.work_dir, Path(source).name))
        merge_adapters(best.model)
        settle_weights(best.model)
        data, metric = runner.cfg.val_dataloader.dataset, best_metric(runner) or ""
        folder = Path(runner.work_dir, FOLDER)
        best.export(
            folder,
            best.data_config(runner.val_dataloader.dataset, data.get("pipeline", ())),
            label_names=list(classes or ()),
            config=Path(runner.cfg.filename or "").name,
            **{metric.rpartition("/")[2]: info.get("best_score")},
        )
        runner.logger.info(f"The best model is exported to {folder}")
