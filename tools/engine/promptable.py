"""Masks asked for by points and boxes: COCO files, a timm model that follows prompts, to train, and its metric."""

import contextlib
import io
import json
from pathlib import Path

import mmengine.registry
import numpy as np
import timm
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from .classifier import Classifier
from .data import check_coco
from .errors import InputError
from .segmenter import dice_loss


@mmengine.registry.DATASETS.register_module()
class PromptedMasks(Dataset):
    """Objects of a COCO file, each with its mask, a point in it and its box.

    An item is `inputs`, an RGB image uint8 ``(3, H, W)``, and of N objects `masks`, bool ``(N, H, W)``, `points`
    ``(N, 1, 2)`` and `boxes` ``(N, 4)``, float32, in pixels. Crowds and objects without a pixel are left out, and
    images without an object.

    Args:
        data_root, ann_file, data_prefix: the COCO file and the folder of images, below `data_root`.
        most: objects an item, drawn anew each time; None for all.
        augment: flip at random; points anywhere in the mask. Else points are where the mask is thickest.

    Raises:
        InputError: a file is missing or cannot be read, no object is left, or an image has another size than the file
            says.
    """

    def __init__(
        self, data_root: str, ann_file: str, data_prefix: str = "", most: int | None = None, augment: bool = False
    ):
        from pycocotools.coco import COCO

        self.folder, self.most, self.augment = Path(data_root, data_prefix), most, augment
        path = check_coco(data_root, ann_file, data_prefix)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(str(path))
            objects = [a for a in self.coco.anns.values() if a.get("segmentation") and not a.get("iscrowd")]
            self.images = {}
            for annotation in objects:
                self.images.setdefault(annotation["image_id"], []).append(annotation)
            files = [self.folder / self.coco.imgs[i]["file_name"] for i in self.images]
        except (AssertionError, AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as e:
            raise InputError(
                f"annotations {str(path)!r} cannot be read ({type(e).__name__}: {e}); expected COCO's images and "
                "annotations"
            ) from e
        if not files:
            raise InputError(f"annotations {str(path)!r} hold no mask; expected objects with a segmentation")
        missing = next((file for file in files if not file.is_file()), None)
        if missing:
            raise InputError(f"image {str(missing)!r} not found; {str(path)!r} names it")
        self.ids = sorted(self.images)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        record, objects = self.coco.imgs[self.ids[index]], self.images[self.ids[index]]
        path = str(self.folder / record["file_name"])
        try:
            image = decode_image(path, ImageReadMode.RGB, apply_exif_orientation=False)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"cannot read image {path!r}; expected a whole image file ({e})") from e
        if image.shape[1:] != (record["height"], record["width"]):
            size, said = f"{image.shape[2]} x {image.shape[1]}", f"{record['width']} x {record['height']}"
            raise InputError(f"image {path!r} is {size}; expected {said} as its annotations")
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
        thickness = distance_transform_edt(np.pad(mask.numpy(), 1))[1:-1, 1:-1]
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
    """Where to compare masks: PointRend's training points (Kirillov et al., 2020, section 3.1).

    Of ``oversample * count`` random places, those where the logits are nearest to 0 make up a share of `importance`;
    the rest are random again.

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
    """IoU of each of two bool ``(N, H, W)``; 0 where both are empty."""
    both, either = ((x.flatten(1).sum(1)) for x in (predicted & true, predicted | true))
    return both / either.clamp(min=1)


@MODELS.register_module()
class PromptSegmenter(BaseModel):
    """A promptable segmenter of timm's registry, to train. The state dict has the timm model's own names.

    Each object is asked for twice, by a point and by its box. Of either mask the loss is binary cross-entropy and Dice
    at `num_points` places, drawn where the mask is uncertain, and the squared error of the IoU that the model says.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.RWKVSAM`; other arguments go to `timm.create_model`.
        num_points: places at which masks are compared.
        data_preprocessor: settings of mmengine's preprocessor, which leaves images as they are.
    """

    def __init__(
        self, model_name: str, *args, num_points: int = 12544, data_preprocessor: dict | None = None, **kwargs
    ):
        super().__init__(data_preprocessor)
        self.model, self.num_points = timm.create_model(model_name, *args, **kwargs), num_points
        if not hasattr(self.model, "encode_image"):
            raise InputError(f"model_name={model_name!r} takes no prompts; expected a model such as 'rwkvsam'")
        self._register_state_dict_hook(Classifier._remove_state_dict_prefix)
        self._register_load_state_dict_pre_hook(Classifier._add_state_dict_prefix)

    def init_weights(self):
        """Nothing: timm initialises or loads in `create_model`, and a second initialisation would undo a loading."""

    @property
    def data_config(self) -> dict:
        """timm's words for how the model prepares its images."""
        cfg, side = self.model.pretrained_cfg, self.model.img_size
        return {"input_size": (3, side, side), "mean": cfg["mean"], "std": cfg["std"], "crop_pct": 1.0}

    def forward(self, inputs: list[Tensor], masks=None, points=None, boxes=None, mode: str = "tensor"):
        """Images uint8 ``(3, H, W)``, and each one's masks, points and boxes, as `PromptedMasks` has them.

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
        """IoU of each object of an image, at its size, asked for by its point and by its box."""
        if not len(masks):
            return []
        encoded = self.model.encode_image(image)
        by_point = self.model.predict(encoded, points, torch.ones_like(points[..., 0])).masks
        by_box = self.model.predict(encoded, boxes=boxes).masks
        pairs = zip(mask_iou(by_point, masks).tolist(), mask_iou(by_box, masks).tolist(), strict=True)
        return [{"point": point, "box": box} for point, box in pairs]

    def losses(self, maps, scaled, masks, points, boxes) -> dict[str, Tensor]:
        """The losses of all objects, asked for by points and by boxes.

        Args:
            maps: what the model's `encode` gives.
            scaled: height and width of each image's part of the square.
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
        # A batch without any object still has a loss, so that every process takes its step.
        return losses or {"loss_none": 0 * sum(m.float().sum() for m in maps)}

    def compare(self, logits: Tensor, scores: Tensor, masks: Tensor, scaled) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, Dice and error of the score of each of an image's masks.

        Args:
            logits: ``(N, S / 4, S / 4)`` of the square.
            scores: ``(N,)``.
            masks: bool ``(N, H, W)`` of the image.
            scaled: height and width of the image's part of the square.
        """
        height, width = scaled
        logits, masks = F.interpolate(logits[:, None], scale_factor=4, mode="bilinear")[:, 0], masks.float()
        logits = logits[:, :height, :width]
        at = uncertain_points(logits, self.num_points)
        values, truth = sample(logits, at), sample(masks, at)
        bce = F.binary_cross_entropy_with_logits(values, truth, reduction="none").mean(1)
        masks = F.interpolate(masks[:, None], (height, width), mode="bilinear", antialias=True)[:, 0] > 0.5
        return bce, dice_loss(values, truth, reduction="none"), (scores - mask_iou(logits > 0, masks)).square()


@METRICS.register_module()
class PromptMetric(BaseMetric):
    """Mean IoU in percent over all objects, asked for by one point ("point_mIoU") and by the box ("box_mIoU")."""

    default_prefix = "prompt"

    def process(self, data_batch, data_samples) -> None:
        """Collect the IoU of each object."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means."""
        return {f"{kind}_mIoU": 100 * float(np.mean([iou[kind] for iou in results])) for kind in ("point", "box")}
