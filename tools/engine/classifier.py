"""Classification: folders of images, and a timm model to train on them, with an optional teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS, MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn import functional as F

from linzoo.backbones.layers.adapters import adapt
from linzoo.quantization.ofq import quantize_weights
from linzoo.quantization.prune import prunable

from .data import NamesImages, check_heads, existing_folder
from .errors import InputError
from .images import ENDINGS, find_files, read_rgb
from .task import Job, Task, TimmModel
from .weights import create_model


def find_classes(
    root: str | Path,
    find: Callable[[Path], list[Path]] = find_files,
    what: str = "image",
    files: str = f"expected files ending in {ENDINGS}",
) -> dict[str, list[Path]]:
    """The class folders of `root`, sorted, with their images or whatever `find` finds. Hidden folders are ignored.

    InputError if the folder is missing or a class has no image; `what` and `files` name what was expected.
    """
    root = existing_folder(root, f"expected one folder of {what}s per class", Path(root).parent)
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise InputError(f"data folder {str(root)!r} holds no class folder; expected one folder of {what}s per class")
    found = {folder.name: find(folder) for folder in folders}
    for folder in folders:
        if not found[folder.name]:
            raise InputError(f"class folder {str(folder)!r} holds no {what}; {files}")
    return found


@DATASETS.register_module()
class ImageFolder(NamesImages, CustomDataset):
    """mmpretrain's folder-per-class data set, which refuses empty classes and names an image that it cannot read.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.
    """

    def __init__(self, make: str | None = None, **kwargs):
        super().__init__(**kwargs)

    def _find_samples(self) -> list[tuple[str, int]]:
        found = find_classes(self.img_prefix)
        self.folder_to_idx = {name: i for i, name in enumerate(found)}
        self._metainfo["classes"] = tuple(found)
        return [(str(f.relative_to(self.img_prefix)), i) for i, files in enumerate(found.values()) for f in files]

    @staticmethod
    def check(settings: dict, cfg: Config) -> list[str] | None:
        """The class names; InputError if folders are missing, or their number is not the model's."""
        if settings.get("ann_file"):
            return None
        folder = Path(settings.get("data_root", ""), settings.get("data_prefix", ""))
        found = list(find_classes(folder))
        check_heads(cfg.model.get("head"), found, "model.head")
        count = cfg.model.get("num_classes", len(found))
        if count != len(found):
            raise InputError(f"config key model.num_classes={count}: {str(folder)!r} has {len(found)} class folders")
        return found


def distillation_loss(student: Tensor, teacher: Tensor, kind: str, tau: float = 1.0) -> Tensor:
    """The loss of the distillation head for differing from the teacher.

    hard: CE(student, argmax teacher)
    soft: tau^2 sum KL(softmax(teacher/tau) || softmax(student/tau)) / numel(student)

    Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021), section 4.

    Args:
        student: logits of the distillation head (B, K).
        teacher: logits of the teacher (B, K).
        kind: "hard" or "soft".
        tau: temperature of "soft".
    """
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    student, teacher = (F.log_softmax(x.float() / tau, dim=1) for x in (student, teacher))
    return tau**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / student.numel()


@MODELS.register_module()
class Classifier(TimmModel):
    """A classifier to train, with an optional timm teacher.

    With distillation "hard" or "soft" the model must be of DeiT's distilled kind (`set_distilled_training`): in
    training it returns (logits, dist_logits). The loss is

        loss = (1 - alpha) loss_module(logits, labels) + alpha distillation_loss(dist_logits, teacher(images))

    The teacher sees the same (mixed) images, in eval mode and without gradient. With "none" the model is trained on
    the same output that evaluation uses.

    Args:
        model_name: timm name of the model; `pretrained` and other keywords as in `TimmModel`.
        loss: settings of an mmpretrain loss.
        train_cfg: `augments`, mmpretrain's batch augmentations.
        data_preprocessor: settings of mmpretrain's preprocessor.
        teacher: keywords of `timm.create_model` for the teacher.
        distillation: "hard", "soft" or "none".
        alpha: weight of the teacher's term.
        tau: temperature of "soft".
        mesa: weight of MESA's term, which `MesaHook` switches on; not with a teacher.
        auxiliary: weights, by name, of the losses from the model's `auxiliary_losses()`; others do not count.
        adapter: ``dict(kind="lora", rank=4, alpha=None)``, or "wara": projections of mixers and MLPs learn through
            low-rank adapters, as does the classifier; the rest is frozen. The exported model has them merged.
        weight_bits: train weights of projections of mixers and MLPs rounded to this many bits, 2 to 8 (see
            `linzoo.quantization.ofq`); the exported model has them rounded. Not with an adapter.
    """

    kinds = ("backbone", "adopted", "fixed")

    def __init__(
        self,
        model_name: str,
        *,
        loss: dict | nn.Module | None = None,
        train_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        teacher: dict | None = None,
        distillation: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
        mesa: float = 0.0,
        auxiliary: dict[str, float] | None = None,
        adapter: dict | None = None,
        weight_bits: int | None = None,
        **kwargs,
    ):
        data_preprocessor = {"type": "mmpretrain.ClsDataPreprocessor", **(data_preprocessor or {})}
        if (train_cfg or {}).get("augments"):
            data_preprocessor["batch_augments"] = train_cfg
        super().__init__(model_name, data_preprocessor=data_preprocessor, **kwargs)
        self.loss_module = loss if isinstance(loss, nn.Module) else MODELS.build(loss or {"type": "CrossEntropyLoss"})
        self.mesa, self.ask_average, self.auxiliary = mesa, None, dict(auxiliary or {})
        if self.auxiliary and not hasattr(self.model, "auxiliary_losses"):
            raise InputError(f"auxiliary={self.auxiliary}: model_name={model_name!r} has no such losses; expected none")
        if adapter and weight_bits is not None:
            raise InputError(f"adapter={adapter} with weight_bits={weight_bits}; expected one or the other")
        if adapter:
            self._adapt(**adapter)
        if weight_bits is not None:
            try:
                quantize_weights(self._projections(), weight_bits)
            except ValueError as e:
                raise InputError(f"weight_bits={weight_bits}: {e}") from e
        if distillation not in ("hard", "soft", "none"):
            raise InputError(f"distillation={distillation!r}; expected 'hard', 'soft' or 'none'")
        self.distillation, self.alpha, self.tau = distillation, alpha, tau
        if distillation == "none":
            return
        if mesa:
            raise InputError(f"mesa={mesa} with distillation={distillation!r}; expected one or the other")
        if teacher is None:
            raise InputError(f"teacher=None with distillation={distillation!r}; expected keywords of timm.create_model")
        if not hasattr(self.model, "set_distilled_training"):
            raise InputError(f"model_name={model_name!r} has no distillation head; expected distillation='none'")
        self.model.set_distilled_training(True)
        self.ask_teacher = _frozen(create_model(**teacher))

    def _projections(self) -> list[nn.Module]:
        return [module for modules in prunable(self.model).values() for module in modules.values()]

    def _adapt(self, kind: str, **settings: Any) -> None:
        heads = self.model.pretrained_cfg["classifier"]
        self.model.requires_grad_(False)
        for name in (heads,) if isinstance(heads, str) else heads:
            self.model.get_submodule(name).requires_grad_(True)
        try:
            adapt(self._projections(), kind, **settings)
        except ValueError as e:
            raise InputError(f"adapter={dict(kind=kind, **settings)}: {e}") from e

    def forward(self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = "tensor") -> Any:
        """Images (B, 3, H, W) to logits (B, K), to the losses ("loss"), or to samples with scores ("predict")."""
        if mode == "loss":
            return self.loss(inputs, data_samples)
        logits = self.model(inputs)
        if mode == "tensor":
            return logits
        samples = data_samples or [DataSample() for _ in logits]
        for sample, scores in zip(samples, logits.softmax(1), strict=True):
            sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))
        return samples

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """The losses of a batch of images (B, 3, H, W) with their labels or label scores."""
        mixed = "gt_score" in data_samples[0]
        targets = [sample.gt_score if mixed else sample.gt_label for sample in data_samples]
        targets = torch.stack(targets) if mixed else torch.cat(targets)
        if self.distillation == "none":
            logits = self.model(inputs)
            losses = {"loss": self.loss_module(logits, targets)}
            if self.auxiliary:
                found = self.model.auxiliary_losses()
                losses |= {f"loss_{name}": weight * found[name] for name, weight in self.auxiliary.items()}
            if self.ask_average is not None:
                losses["loss_mesa"] = self.mesa * F.cross_entropy(logits, self.ask_average(inputs).softmax(dim=1))
            return losses
        logits, dist_logits = self.model(inputs)
        label_loss = self.loss_module(logits, targets)
        teacher_loss = distillation_loss(dist_logits, self.ask_teacher(inputs), self.distillation, self.tau)
        return {"loss_label": (1 - self.alpha) * label_loss, "loss_teacher": self.alpha * teacher_loss}

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: path, label, confidence (softmax) and the five likeliest labels with their confidences."""
        samples = [sample for batch in job.batches() for sample in self.test_step(batch)]
        classes, results = job.classes or [str(i) for i in range(len(samples[0].pred_score))], []
        for path, sample in zip(job.inputs, samples, strict=True):
            scores, labels = sample.pred_score.sort(descending=True)
            likeliest = zip(scores[:5].tolist(), labels[:5].tolist(), strict=True)
            top5 = [{"label": classes[label], "confidence": score} for score, label in likeliest]
            results.append(dict(path=str(path), **top5[0], top5=top5))
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The image with its label and confidence; red if the image's folder names another label."""
        axis.imshow(read_rgb(result["path"]))
        folder, names = Path(result["path"]).parent.name, {top["label"] for top in result["top5"]}
        color = "crimson" if folder in names and folder != result["label"] else "black"
        axis.set_title(f"{result['label']}  {result['confidence']:.0%}", fontsize=10, color=color)


class BackboneClassifier(Task):
    """mmpretrain's classifiers around a backbone."""

    predict_files = Classifier.predict_files
    draw = staticmethod(Classifier.draw)


@HOOKS.register_module()
class MesaHook(Hook):
    """MESA: from epoch `begin` on a `Classifier` also learns from the run's own average (Du et al., 2022, section 3.3).

    loss += mesa CE(logits, softmax(average(images))), on the same mixed images and without gradient to the average. The
    average is that of the run's EMAHook.

    Args:
        begin: the first epoch with the term, counted from 0.

    Raises:
        InputError: the run has no EMAHook.
    """

    def __init__(self, begin: int):
        self.begin = begin

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch the term on."""
        average = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        if average is None:
            raise InputError("MesaHook: the run averages nothing; expected an EMAHook in default_hooks")
        classifier = runner.model.module if is_model_wrapper(runner.model) else runner.model
        on = runner.epoch >= self.begin
        classifier.ask_average = _frozen(average.ema_model.module.model) if on else None


def _frozen(teacher: nn.Module) -> Callable[[Tensor], Tensor]:
    """The teacher as a plain function: none of its parameters enters the optimizer, checkpoints, DDP or EMA copies."""
    teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def ask(images: Tensor) -> Tensor:
        return teacher.to(images.device)(images)

    return ask
