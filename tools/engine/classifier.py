"""A timm model as mmpretrain classifier, with an optional teacher."""

import timm
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmpretrain.models import TimmClassifier
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError


def distillation_loss(student: Tensor, teacher: Tensor, kind: str, tau: float = 1.0) -> Tensor:
    """What the distillation head pays for differing from the teacher.

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
class Classifier(TimmClassifier):
    """A model of timm's registry to train, with an optional timm teacher.

    With distillation "hard" or "soft" the model must be of DeiT's distilled kind (`set_distilled_training`), so that in
    training it returns (logits, dist_logits), and

        loss = (1 - alpha) loss_module(logits, labels) + alpha distillation_loss(dist_logits, teacher(images))

    The teacher sees the same (mixed) images, in eval mode and without gradient. With "none" the model is trained on
    the output that it is evaluated with.

    Args:
        model_name: timm name of the model; other keywords go to `timm.create_model`.
        teacher: keywords of `timm.create_model` for the teacher.
        distillation: "hard", "soft" or "none".
        alpha: weight of the teacher's term.
        tau: temperature of "soft".
        mesa: weight of MESA's term, which `MesaHook` switches on; not with a teacher.
    """

    def __init__(
        self,
        model_name: str,
        *,
        teacher: dict | None = None,
        distillation: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
        mesa: float = 0.0,
        **kwargs,
    ):
        super().__init__(model_name, **kwargs)
        self.mesa, self.ask_average = mesa, None
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
        self.ask_teacher = _frozen(timm.create_model(**teacher))

    def init_weights(self):
        """Nothing: timm initialises or loads in `create_model`, and a second initialisation would undo a loading."""

    def loss(self, inputs: Tensor, data_samples: list, **kwargs) -> dict[str, Tensor]:
        """The losses of a batch of images (B, 3, H, W) with their labels or label scores."""
        if self.distillation == "none":
            logits = self.model(inputs)
            losses = self._get_loss(logits, data_samples, **kwargs)
            if self.ask_average is not None:
                losses["loss_mesa"] = self.mesa * F.cross_entropy(logits, self.ask_average(inputs).softmax(dim=1))
            return losses
        logits, dist_logits = self.model(inputs)
        label_loss = self._get_loss(logits, data_samples, **kwargs)["loss"]
        teacher_loss = distillation_loss(dist_logits, self.ask_teacher(inputs), self.distillation, self.tau)
        return {"loss_label": (1 - self.alpha) * label_loss, "loss_teacher": self.alpha * teacher_loss}

    # State dicts hold the timm model's own names. mmpretrain's versions of these two hooks serve a classifier at the
    # root only: within an EMA copy the one has no effect, and the other drops keys outside `prefix` (the step count).
    @staticmethod
    def _remove_state_dict_prefix(self, state_dict, prefix, local_metadata):
        for key in [k for k in state_dict if k.startswith(f"{prefix}model.")]:
            state_dict[prefix + key.removeprefix(f"{prefix}model.")] = state_dict.pop(key)

    @staticmethod
    def _add_state_dict_prefix(state_dict, prefix, *_):
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


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

    def before_train_epoch(self, runner):
        """Switch the term on."""
        average = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        if average is None:
            raise InputError("MesaHook: the run averages nothing; expected an EMAHook in default_hooks")
        classifier = runner.model.module if is_model_wrapper(runner.model) else runner.model
        on = runner.epoch >= self.begin
        classifier.ask_average = _frozen(average.ema_model.module.model) if on else None


def _frozen(teacher: nn.Module):
    """The teacher as a plain function: no parameter of it enters the optimizer, checkpoints, DDP or EMA copies."""
    teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def ask(images: Tensor) -> Tensor:
        return teacher.to(images.device)(images)

    return ask
