"""A model of video that predicts the next frame, to train; how much better than copying it is."""

import numpy as np
import timm
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from torch import Tensor
from torch.nn import functional as F

from .classifier import Classifier


@MODELS.register_module()
class NextFrame(BaseModel):
    """A next-frame model of timm's registry, trained by half the squared and half the absolute error.

    It sees all frames of a clip but the last one and says what follows each. The state dict has the timm model's own
    names.

    Args:
        model_name: timm name of a model that maps clips ``(B, T, C, H, W)`` in [-1, 1] to those one frame later, and
            to its states; further arguments go to `timm.create_model`.
        context: Frames that are seen before errors count in "predict": one frame does not tell where things move.
        data_preprocessor: settings of mmengine's preprocessor.
    """

    def __init__(self, model_name: str, *args, context: int = 5, data_preprocessor: dict | None = None, **kwargs):
        super().__init__(data_preprocessor)
        self.model, self.context = timm.create_model(model_name, *args, **kwargs), context
        self._register_state_dict_hook(Classifier._remove_state_dict_prefix)
        self._register_load_state_dict_pre_hook(Classifier._add_state_dict_prefix)

    def init_weights(self):
        """Nothing: timm initialises or loads in `create_model`, and a second initialisation would undo a loading."""

    def forward(self, inputs: list[Tensor], data_samples=None, mode: str = "tensor"):
        """Clips, uint8 ``(T, C, H, W)`` each, to predictions, losses or errors.

        Args:
            inputs: clips of one size.
            data_samples: ignored.
            mode: "tensor" for the frames that follow each but the last ``(B, T - 1, C, H, W)`` in [-1, 1]; "loss"; or
                "predict" for mean squared errors of each clip with values in [0, 1], behind the context: "one_step" of
                frames given all before, "rollout" of all frames given the context alone, and "copy_one_step" and
                "copy_rollout" of taking the last frame seen instead.
        """
        clips = torch.stack(list(inputs)).float() / 127.5 - 1
        seen, following = clips[:, :-1], clips[:, 1:]
        if mode == "predict":
            given, rest = clips[:, : self.context], clips[:, self.context :]
            guesses = {
                "one_step": self.model(seen)[0][:, self.context - 1 :],
                "rollout": self.model.generate(given, rest.shape[1]),
                "copy_one_step": seen[:, self.context - 1 :],
                "copy_rollout": given[:, -1:].expand_as(rest),
            }
            errors = {name: ((guess - rest) / 2).square().flatten(1).mean(1) for name, guess in guesses.items()}
            return [{name: error[i].item() for name, error in errors.items()} for i in range(len(clips))]
        predicted = self.model(seen)[0]
        if mode == "tensor":
            return predicted
        predicted = predicted.float()
        return {"loss_l2": F.mse_loss(predicted, following) / 2, "loss_l1": F.l1_loss(predicted, following) / 2}


@METRICS.register_module()
class NextFrameMetric(BaseMetric):
    """Mean squared errors over all clips, and by how many percent the model's are below those of copying a frame."""

    default_prefix = "frame"

    def process(self, data_batch, data_samples) -> None:
        """Collect the errors of each clip."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means, and `below_copy` and `rollout_below_copy` in percent."""
        means = {name: float(np.mean([errors[name] for errors in results])) for name in results[0]}
        means["below_copy"] = 100 * (1 - means["one_step"] / means["copy_one_step"])
        means["rollout_below_copy"] = 100 * (1 - means["rollout"] / means["copy_rollout"])
        return means
