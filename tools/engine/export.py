"""The best model of a run, as timm loads it."""

import copy
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from timm.models import save_for_hf

from .weights import read_checkpoint

FOLDER = "export"


@HOOKS.register_module()
class ExportHook(Hook):
    """After training, writes `work_dir/export/{model.safetensors,config.json}`.

    The folder is timm's own exchange format: `timm.create_model("local-dir:work_dir/export", pretrained=True)`, or the
    weights alone by `pretrained_cfg_overlay=dict(file=".../model.safetensors", num_classes=K)` (without the number,
    timm takes the head for ImageNet's and drops it). `config.json` names the model, its class names, input size, mean
    and std, the training config and the best value of the metric. The weights are those of the best validation (the
    averaged ones where the run averages), else the last.

    Args:
        metric: what `save_best` of the checkpoint hook names; `config.json` has its value under its last part.
    """

    priority = "LOWEST"

    def __init__(self, metric: str = "accuracy/top1"):
        self.metric = metric

    @master_only
    def after_train(self, runner):
        """Write the export."""
        info = runner.message_hub.runtime_info
        source = info.get("best_ckpt", info.get("last_ckpt"))
        if source is None:
            return
        trained = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model = copy.deepcopy(trained.model)
        # A moved work dir keeps its old path in the message hub.
        state, classes = read_checkpoint(Path(runner.work_dir, Path(source).name))
        model.load_state_dict(state)
        export(
            model,
            Path(runner.work_dir, FOLDER),
            label_names=list(classes or ()),
            data_config=_data_config(runner, trained),
            config=Path(runner.cfg.filename or "").name,
            **{self.metric.rpartition("/")[2]: info.get("best_score")},
        )
        runner.logger.info(f"The best model is exported to {Path(runner.work_dir, FOLDER)}")


def export(model, folder: Path, label_names: list[str], data_config: dict, **facts) -> None:
    """Write a timm model as `folder/model.safetensors` and `folder/config.json`, each whole or not at all.

    Args:
        model: timm model with the weights to write.
        label_names: class names, by index.
        data_config: timm's preprocessing keys (input_size, mean, std ...).
        facts: further entries of config.json.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    save_for_hf(
        model,
        str(partial),
        model_config=dict(label_names=label_names, **facts),
        data_config=data_config,
        safe_serialization=True,
    )
    folder.mkdir(exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()


def _data_config(runner, trained) -> dict:
    if hasattr(trained, "data_config"):  # it prepares images itself
        return trained.data_config
    preprocessor = trained.data_preprocessor
    size = tuple(runner.val_dataloader.dataset[0]["inputs"].shape)
    if not hasattr(preprocessor, "mean"):
        return {"input_size": size, "mean": (0.0,) * size[0], "std": (1.0,) * size[0], "crop_pct": 1.0}
    pipeline = runner.cfg.val_dataloader.dataset.pipeline
    edge = next((step.scale for step in pipeline if step.type == "ResizeEdge"), size[-1])
    mean, std = ((x.flatten() / 255).tolist() for x in (preprocessor.mean, preprocessor.std))
    return {"input_size": size, "mean": mean, "std": std, "crop_pct": size[-1] / edge}
