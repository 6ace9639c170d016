"""Masks for point and box prompts: COCO files, a promptable timm model to train, and its metric."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmengine.registry
import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .coco import check_coco
from .errors import InputError, note
from .files import save_image
from .images import check_size, read_labels, read_rgb
from .segmenter import dice_loss, draw_outline
from .task import Job, TimmModel


@mmengine.registry.DATASETS.register_module()
class PromptedMasks(Dataset):
    """Objects of a COCO file, each with its mask, a point in it and its box.

    An item is `inputs`, an RGB image uint8 ``(3, H, W)``, and for N objects `masks`, bool ``(N, H, W)``, `points`
    ``(N, 1, 2)`` and `boxes` ``(N, 4)``, float32, in pixels. Left out are crowds, objects without a pixel, and images
    without an object.

    Args:
        data_root, ann_file, data_prefix: the COCO file and the folder of images, below `data_root`.
        most: objects per item, drawn anew each time; None for all.
        augment: flip at random, and take points anywhere in the mask. Otherwise points are where the mask is thickest.

    Raises:
        InputError: a file is missing or cannot be read, no object is left, or an image's size differs from the file's
            entry.
    """

    def __init__(
        self, data_root: str, ann_file: str, data_prefix: str = "", most: int | None = None, augment: bool = False
    ):
        from pycocotools.coco import COCO

        self.folder, self.most, self.augment = Path(data_root, data_prefix), most, augment
        path = check_coco(data_root, ann_file, data_prefix)
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco: Any = COCO(str(path))
        self.images: dict[Any, list[dict]] = {}
        for annotation in self.coco.anns.values():
            if annotation.get("segmentation") and not annotation.get("iscrowd"):
                self.images.setdefault(annotation["image_id"], []).append(annotation)
        if not self.images:
            raise InputError(f"annotations {str(path)!r} hold no mask; expected objects with a segmentation")
        if left_out := len(self.coco.anns) - sum(map(len, self.images.values())):
            note(f"{left_out} of {len(self.coco.anns)} objects of {str(path)!r} are crowds or without mask: left out")
        self.ids = sorted(self.images)

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if files are missing or an annotation is impossible."""
        check_coco(settings["data_root"], settings["ann_file"], settings.get("data_prefix", ""))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        record, objects = self.coco.imgs[self.ids[index]], self.images[self.ids[index]]
        path = str(self.folder / record["file_name"])
        image = torch.from_numpy(read_rgb(path).copy()).permute(2, 0, 1).contiguous()
        check_size(path, image.shape[1:], (record["height"], record["width"]))
        if self.augment:
            objects = [objects[i] for i in torch.randperm(len(objects))[: self.most]]
        masks = torch.from_numpy(np.stack([self.coco.annToMask(o) for o in objects[: self.most]])).bool()
        masks = masks[masks.any(-1).any(-1)]
        if self.augment and torch.rand(()) < 0.5:
            image, masks = image.flip(-1), masks.flip(-1)
        points = torch.stack([self.point(mask) for mask in masks]) if len(masks) else torch.zeros(0, 1, 2)
        boxes = torch.stack([mask_box(mask) for mask in masks]) if len(masks) else torch.zeros(0, 4)
        return {"inputs": image, "masks": masks, "points": points, "boxes": boxes}

    def point(self, mask: Tensor) -> Tensor:
        """x and y of a pixel of the mask ``(1, 2)``."""
        if self.augment:
            pixels = mask.nonzero()
            return pixels[torch.randint(len(pixels), (1,))].flip(-1).float()
        thickness: Any = distance_transform_edt(np.pad(mask.numpy(), 1))
        thickness = thickness[1:-1, 1:-1]
        y, x = np.unravel_index(thickness.argmax(), thickness.shape)
        return torch.tensor([[x, y]], dtype=torch.float32)


def mask_box(mask: Tensor) -> Tensor:
    """x0, y0, x1, y1 of a mask's edges."""
    y, x = mask.nonzero().unbind(1)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def sample(maps: Tensor, at: Tensor) -> Tensor:
    """Bilinear values of maps ``(N, H, W)`` at `at` ``(N, P, 2)``, x and y from 0 to 1: ``(N, P)``."""
    return F.grid_sample(maps[:, None], 2 * at[:, None] - 1, align_corners=False, padding_mode="border")[:, 0, 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, count: int, oversample: int = 3, importance: float = 0.75) -> Tensor:
    """Points at which to compare masks: PointRend's training points (Kirillov et al., 2020, section 3.1).

    A share of `importance` are those of ``oversample * count`` random points where the logits are nearest to 0; the
    rest are random again.

    Args:
        logits: ``(N, H, W)``.
        count: points P of each.

    Returns:
        x and y from 0 to 1, ``(N, P, 2)``.
    """
    hard = round(importance * count)
    drawn = torch.rand(len(logits), oversample * count, 2, device=logits.device)
    nearest = sample(logits, drawn).abs().topk(hard, dim=1, largest=False).indices
    rest = torch.rand(len(logits), count - hard, 2, device=logits.device)
    return torch.cat([drawn.gather(1, nearest[..., None].expand(-1, -1, 2)), rest], 1)


def mask_iou(predicted: Tensor, true: Tensor) -> Tensor:
    """IoU of each pair of bool ``(N, H, W)``; 0 where both are empty."""
    both, either = ((x.flatten(1).sum(1)) for x in (predicted & true, predicted | true))
    return both / either.clamp(min=1)


@MODELS.register_module()
class PromptSegmenter(TimmModel):
    """A promptable segmenter to train.

    Each object is prompted twice, by a point and by its box. The loss of either mask is binary cross-entropy and Dice
    at `num_points` points, drawn where the mask is uncertain, and the squared error of the predicted IoU.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.RWKVSAM`; other arguments as in `TimmModel`.
        num_points: points at which masks are compared.
    """

    kinds, needs = ("promptable",), "encode_image"

    def __init__(self, model_name: str, *args, num_points: int = 12544, **kwargs):
        super().__init__(model_name, *args, **kwargs)
        self.num_points = num_points

    def data_config(self, dataset: Any, pipeline: list[dict]) -> dict:
        """timm's settings for how the model itself prepares its images."""
        cfg, side = self.model.pretrained_cfg, self.model.img_size
        return {"input_size": (3, side, side), "mean": cfg["mean"], "std": cfg["std"], "crop_pct": 1.0}

    def forward(
        self, inputs: list[Tensor], masks: Any = None, points: Any = None, boxes: Any = None, mode: str = "tensor"
    ) -> Any:
        """Images uint8 ``(3, H, W)``, and each one's masks, points and boxes, as in `PromptedMasks`.

        Args:
            mode: "loss" for the losses, "predict" for a list with ``{"point": IoU, "box": IoU}`` of every object,
                "tensor" for the images' embeddings.
        """
        if mode == "predict":
            return [found for item in zip(inputs, masks, points, boxes, strict=True) for found in self.measure(*item)]
        prepared = [self.model.prepare(image) for image in inputs]
        maps = self.model.encode(torch.cat([x for x, _ in prepared]))
        return maps[2] if mode == "tensor" else self.losses(maps, [s for _, s in prepared], masks, points, boxes)

    def measure(self, image: Tensor, masks: Tensor, points: Tensor, boxes: Tensor) -> list[dict]:
        """IoU of each object in an image, at its size, prompted by its point and by its box."""
        if not len(masks):
            return []
        encoded = self.model.encode_image(image)
        by_point = self.model.predict(encoded, points, torch.ones_like(points[..., 0])).masks
        by_box = self.model.predict(encoded, boxes=boxes).masks
        pairs = zip(mask_iou(by_point, masks).tolist(), mask_iou(by_box, masks).tolist(), strict=True)
        return [{"point": point, "box": box} for point, box in pairs]

    def losses(
        self, maps: Sequence[Tensor], scaled: list, masks: list[Tensor], points: Any, boxes: Any
    ) -> dict[str, Any]:
        """The losses of all objects, prompted by points and by boxes.

        Args:
            maps: the output of the model's `encode`.
            scaled: height and width of each image inside the square.
            masks, points, boxes: of each image, in its own pixels.
        """
        counts = torch.tensor([len(m) for m in masks], device=maps[2].device)
        index = torch.arange(len(masks), device=counts.device).repeat_interleave(counts)
        sizes = [m.shape[1:] for m in masks]
        scales = [boxes[0].new_tensor([w / W, h / H]) for (H, W), (h, w) in zip(sizes, scaled, strict=True)]
        points = torch.cat([p * s for p, s in zip(points, scales, strict=True)])
        boxes = torch.cat([b * s.repeat(2) for b, s in zip(boxes, scales, strict=True)])
        asked = {"point": (points, torch.ones_like(points[..., 0]), None), "box": (None, None, boxes)}
        losses = {}
        for kind, prompts in asked.items() if len(index) else ():
            logits, scores = self.model.decode(maps, *prompts, index)
            parts = [
                self.compare(own.float(), score.float(), true, size)
                for own, score, true, size in zip(
                    logits.split(counts.tolist()), scores.split(counts.tolist()), masks, scaled, strict=True
                )
                if len(true)
            ]
            for name, of_each in zip(("bce", "dice", "score"), zip(*parts, strict=True), strict=True):
                losses[f"loss_{kind}_{name}"] = torch.cat(of_each).mean()
        # A batch without any object still has a loss, so that every process takes a step.
        return losses or {"loss_none": 0 * sum(m.float().sum() for m in maps)}

    def compare(
        self, logits: Tensor, scores: Tensor, masks: Tensor, scaled: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, Dice and score error for each mask of an image.

        Args:
            logits: ``(N, S / 4, S / 4)`` of the square.
            scores: ``(N,)``.
            masks: bool ``(N, H, W)`` of the image.
            scaled: height and width of the image inside the square.
        """
        height, width = scaled
        logits, masks = F.interpolate(logits[:, None], scale_factor=4, mode="bilinear")[:, 0], masks.float()
        logits = logits[:, :height, :width]
        at = uncertain_points(logits, self.num_points)
        values, truth = sample(logits, at), sample(masks, at)
        bce = F.binary_cross_entropy_with_logits(values, truth, reduction="none").mean(1)
        masks = F.interpolate(masks[:, None], (height, width), mode="bilinear", antialias=True)[:, 0] > 0.5
        return bce, dice_loss(values, truth, reduction="none"), (scores - mask_iou(logits > 0, masks)).square()

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the prompts for every image."""
        for name, parts in (("--point", ("X", "Y")), ("--box", ("X0", "Y0", "X1", "Y1"))):
            numbers = dict(type=float, action="append", default=[], nargs=len(parts), metavar=parts)
            parser.add_argument(name, help="prompt for an object, in pixels; repeatable", **numbers)

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: its path, and for each point and box the mask file (0 and 255), its share and score."""
        asked = [("point", point) for point in job.options.point] + [("box", box) for box in job.options.box]
        if not asked:
            name = self.model.pretrained_cfg["architecture"]
            raise InputError(f"model_name={name!r} needs points or boxes; expected --point X Y or --box X0 Y0 X1 Y1")
        files = [job.place("masks", f".{i}.png") for i in range(len(asked))]
        device, results = next(self.parameters()).device, []
        for row, path in enumerate(job.inputs):
            image = self.model.encode_image(torch.from_numpy(read_rgb(path).copy()).permute(2, 0, 1).to(device))
            found = []
            for i, (kind, prompt) in enumerate(asked):
                prompt = torch.tensor([prompt], device=device)
                prompts = {"boxes": prompt} if kind == "box" else {"points": prompt[None]}
                try:
                    mask = self.model.predict(image, **prompts)
                except ValueError as e:
                    raise InputError(f"image {str(path)!r}: {e}") from e
                pixels, file = mask.masks[0].cpu().numpy(), files[i][row]
                save_image(pixels.astype(np.uint8) * 255, file)
                facts = {"share": float(pixels.mean()), "score": float(mask.scores[0])}
                found.append({kind: prompt[0].tolist(), "mask": str(file), **facts})
            results.append({"path": str(path), "masks": found})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The image with the outlines of its masks."""
        axis.imshow(read_rgb(result["path"]))
        for i, found in enumerate(result["masks"]):
            draw_outline(axis, read_labels(found["mask"]) > 0, f"C{i}")


@METRICS.register_module()
class PromptMetric(BaseMetric):
    """Mean IoU in percent over all objects, prompted by one point ("point_mIoU") and by the box ("box_mIoU")."""

    default_prefix = "prompt"

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Collects the IoU of each object."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means."""
        return {f"{kind}_mIoU": 100 * float(np.mean([iou[kind] for iou in results])) for kind in ("point", "box")}
