"""Segmentation of one class: images with masks, a timm model to train that returns mask logits, and its metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmengine.registry
import numpy as np
import torch
from matplotlib.axes import Axes
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from mmengine.structures import PixelData
from torch import Tensor
from torch.nn import functional as F

from .data import ENOUGH, NamesImages, pair_files, spread
from .errors import InputError
from .files import save_image
from .images import image_size, read_labels, read_rgb
from .task import Job, TimmModel
from .weights import create_model


def read_mask(path: str | Path, image: str | Path, size: tuple[int, int]) -> np.ndarray:
    """The mask of an image of `size`, uint8 (H, W) of 0 and 1.

    InputError if it cannot be read, has another size than the image, or values other than 0 and 255 (or 0 and 1).
    """
    mask = read_labels(path, "mask")
    if mask.shape != tuple(size):
        found, expected = (f"{w} x {h}" for h, w in (mask.shape, size))
        raise InputError(f"mask {str(path)!r} is {found}; expected {expected} as its image {str(image)!r}")
    values = np.bincount(mask.ravel(), minlength=256).nonzero()[0]
    odd = [int(value) for value in values if value not in (0, values[-1])]
    if odd or values[-1] not in (0, 1, 255):
        raise InputError(f"mask {str(path)!r} holds the value {(odd or values)[-1]}; expected 0 and 255, or 0 and 1")
    return (mask > 0).astype(np.uint8)


@mmengine.registry.TRANSFORMS.register_module()
class LoadMask(BaseTransform):
    """Adds the mask of a loaded image, as mmseg's transforms expect it: `gt_seg_map` (H, W) of 0 and 1."""

    def transform(self, results: dict) -> dict:
        """Reads the mask by `read_mask`."""
        results["gt_seg_map"] = read_mask(results["seg_map_path"], results["img_path"], results["img"].shape[:2])
        results["seg_fields"].append("gt_seg_map")
        return results


@mmengine.registry.DATASETS.register_module()
class MaskedImages(NamesImages, BaseDataset):
    """Images of `data_root/data_prefix/images` with masks of equal names in `masks/` beside it.

    Args:
        data_prefix: folder below `data_root`.
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.
    """

    def __init__(self, data_root: str, data_prefix: str = "", make: str | None = None, **kwargs):
        self.folder = Path(data_root, data_prefix)
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The paths of each image and its mask."""
        pairs = pair_files(self.folder)
        return [dict(img_path=str(image), seg_map_path=str(mask), seg_fields=[]) for image, mask in pairs]

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if files are missing or have no partner, or a mask is invalid."""
        pairs = pair_files(Path(settings["data_root"], settings.get("data_prefix", "")))
        for image, mask in spread(pairs)[:ENOUGH]:
            read_mask(mask, image, image_size(image))


def dice_loss(logits: Tensor, masks: Tensor, reduction: str = "mean") -> Tensor:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) for each image, p the sigmoid of the logits.

    Args:
        logits: (B, ...).
        masks: zeros and ones (B, ...), of the logits' dtype.
        reduction: "mean" over the images, or "none".
    """
    p, t = logits.sigmoid().flatten(1), masks.flatten(1)
    loss = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return loss.mean() if reduction == "mean" else loss


@MODELS.register_module()
class Segmenter(TimmModel):
    """A dense model, trained with binary cross-entropy plus Dice loss. The images of a batch have one size.

    Args:
        model_name: timm name of a model whose output is one map of mask logits; other arguments as in `TimmModel`.
        init_from: keywords of `timm.create_model` for a classifier that the model's `init_from_classifier` starts from.

    Raises:
        InputError: the number of the model's classes is not one, or it cannot start from that classifier.
    """

    kinds = ("segmentation",)

    def __init__(self, model_name: str, *args, init_from: dict | None = None, **kwargs):
        super().__init__(model_name, *args, **kwargs)
        if self.model.num_classes != 1:
            raise InputError(f"model_name={model_name!r} has num_classes={self.model.num_classes}; expected one mask")
        if init_from is not None:
            if not hasattr(self.model, "init_from_classifier"):
                raise InputError(f"model_name={model_name!r} cannot start from a classifier; expected init_from=None")
            try:
                self.model.init_from_classifier(create_model(**init_from).state_dict())
            except ValueError as e:
                raise InputError(f"init_from={dict(init_from)}: {model_name!r} cannot start from it: {e}") from e

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
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

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: its path, its mask's path and the mask's share of the pixels.

        A mask is a PNG file of 0 and 255, as large as the image: 255 where the probability, interpolated from the
        model's map, is at least 0.5.
        """
        files, results = job.place("masks", ".png"), []
        samples = (sample for batch in job.batches() for sample in self.test_step(batch))
        for path, file, sample in zip(job.inputs, files, samples, strict=True):
            p = F.interpolate(sample.seg_logits.data.sigmoid()[None], sample.ori_shape, mode="bilinear")
            mask = (p[0, 0] >= 0.5).to("cpu", torch.uint8).numpy() * 255
            save_image(mask, file)
            results.append({"path": str(path), "mask": str(file), "share": float((mask > 0).mean())})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The image with the outline of its mask and its share of the image."""
        axis.imshow(read_rgb(result["path"]))
        draw_outline(axis, read_labels(result["mask"]) > 0)
        axis.set_title(f"{result['share']:.1%}", fontsize=10)


def draw_outline(axis: Axes, mask: np.ndarray, color: str = "cyan") -> None:
    """The outline of a mask (H, W), closed at the image's edge."""
    inside = np.pad(mask, 1)
    if inside.any():
        height, width = inside.shape
        axis.contour(range(-1, width - 1), range(-1, height - 1), inside, [0.5], colors=color, linewidths=1)


@METRICS.register_module()
class MaskMetric(BaseMetric):
    """Metrics in percent from one confusion matrix over all pixels of all images.

    "mIoU", as in the lesion papers, is the IoU of the foreground, TP / (TP + FP + FN). DSC: 2 TP / (2 TP + FP + FN).
    """

    default_prefix = "mask"

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Counts the pixels of each image."""
        from torchmetrics.functional.classification import (
            binary_stat_scores,
        )  # takes seconds to import; classifiers need not wait

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
