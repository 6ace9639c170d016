"""A timm model that returns mask logits, to train; the metrics of its masks."""

import timm
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from mmengine.structures import PixelData
from torch import Tensor
from torch.nn import functional as F

from .classifier import Classifier
from .errors import InputError


def dice_loss(logits: Tensor, masks: Tensor, reduction: str = "mean") -> Tensor:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of each image, p the sigmoid of the logits.

    Args:
        logits: (B, ...).
        masks: zeros and ones (B, ...), of the logits' dtype.
        reduction: "mean" over the images, or "none".
    """
    p, t = logits.sigmoid().flatten(1), masks.flatten(1)
    loss = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return loss.mean() if reduction == "mean" else loss


@MODELS.register_module()
class Segmenter(BaseModel):
    """A dense model of timm's registry, trained by binary cross-entropy plus Dice loss.

    The images of a batch have one size. The state dict has the timm model's own names.

    Args:
        model_name: timm name of a model whose output is one map of mask logits; other arguments go to
            `timm.create_model`.
        init_from: keywords of `timm.create_model` for a classifier that the model's `init_from_classifier` starts from.
        data_preprocessor: settings of mmengine's preprocessor.

    Raises:
        InputError: the model has another number of classes than one, or cannot start from that classifier.
    """

    def __init__(
        self, model_name: str, *args, init_from: dict | None = None, data_preprocessor: dict | None = None, **kwargs
    ):
        super().__init__(data_preprocessor)
        self.model = timm.create_model(model_name, *args, **kwargs)
        if self.model.num_classes != 1:
            raise InputError(f"model_name={model_name!r} has num_classes={self.model.num_classes}; expected one mask")
        if init_from is not None:
            if not hasattr(self.model, "init_from_classifier"):
                raise InputError(f"model_name={model_name!r} cannot start from a classifier; expected init_from=None")
            try:
                self.model.init_from_classifier(timm.create_model(**init_from).state_dict())
            except ValueError as e:
                raise InputError(f"init_from={dict(init_from)}: {model_name!r} cannot start from it: {e}") from e
        self._register_state_dict_hook(Classifier._remove_state_dict_prefix)
        self._register_load_state_dict_pre_hook(Classifier._add_state_dict_prefix)

    def init_weights(self):
        """Nothing: timm initialises or loads in `create_model`, and a second initialisation would undo a loading."""

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = "tensor"):
        """Images (B, 3, H, W) to logits (B, 1, H, W), to the losses, or to the samples with predicted masks.

        Args:
            inputs: images.
            data_samples: mmseg's samples; their `gt_sem_seg` is the mask (1, H, W) of zeros and ones.
            mode: "tensor", "loss", or "predict", which sets `seg_logits` and `pred_sem_seg` (1, H, W), the mask of the
                pixels whose probability is at least 0.5.
        """
        logits = self.model(inputs)
        if mode == "tensor":
            return logits
        logits = logits.float()
        if mode == "loss":
            masks = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).to(logits)
            bce = F.binary_cross_entropy_with_logits(logits, masks)
            return {"loss_bce": bce, "loss_dice": dice_loss(logits, masks)}
        for sample, map_ in zip(data_samples, logits, strict=True):
            sample.seg_logits = PixelData(data=map_)
            sample.pred_sem_seg = PixelData(data=(map_ >= 0).long())
        return data_samples


@METRICS.register_module()
class MaskMetric(BaseMetric):
    """Metrics in percent from one confusion matrix over all pixels of all images.

    "mIoU" as the lesion papers have it: the IoU of the foreground, TP / (TP + FP + FN). DSC: 2 TP / (2 TP + FP + FN).
    """

    default_prefix = "mask"

    def process(self, data_batch, data_samples) -> None:
        """Count the pixels of each image."""
        from torchmetrics.functional.classification import (
            binary_stat_scores,
        )  # seconds, which classifiers need not wait

        for sample in data_samples:
            counts = binary_stat_scores(sample["pred_sem_seg"]["data"], sample["gt_sem_seg"]["data"])
            self.results.append(counts.cpu())

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of the summed counts."""
        tp, fp, tn, fn, _ = torch.stack(results).sum(0).tolist()
        shares = {
            "mIoU": (tp, tp + fp + fn),
            "DSC": (2 * tp, 2 * tp + fp + fn),
            "accuracy": (tp + tn, tp + fp + tn + fn),
            "specificity": (tn, tn + fp),
            "sensitivity": (tp, tp + fn),
        }
        return {name: 100 * part / max(whole, 1) for name, (part, whole) in shares.items()}
