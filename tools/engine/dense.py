"""mmseg's segmenters and mmdet's detectors: label maps, and results written and drawn."""

import argparse
from pathlib import Path
from typing import Any, ClassVar

import mmengine.registry
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import BackboneClassifier
from .data import CHECKS, ENOUGH, NamesImages, check_heads, existing_folder, spread
from .errors import InputError, existing_file
from .files import save_image
from .images import find_files, image_size, is_hidden, read_labels, read_rgb
from .task import Job, Task


@mmengine.registry.TRANSFORMS.register_module()
class LoadLabelMap(LoadAnnotations):
    """mmseg's transform, reading through `read_labels`; `load_config` replaces mmseg's by it."""

    def _load_seg_map(self, results: dict) -> None:
        labels = read_labels(results["seg_map_path"])
        if results["reduce_zero_label"] if self.reduce_zero_label is None else self.reduce_zero_label:
            labels = np.where(np.isin(labels, (0, 255)), 255, labels - 1).astype(np.uint8)
        mapped = labels.copy()
        for old, new in (results.get("label_map") or {}).items():
            mapped[labels == old] = new
        results["gt_seg_map"] = mapped
        results["seg_fields"].append("gt_seg_map")


@mmengine.registry.DATASETS.register_module()
class LabelMaps(NamesImages, BaseSegDataset):
    """mmseg's data set of images with label maps of equal names; it names any file that it cannot read.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.
    """

    def __init__(self, make: str | None = None, **kwargs):
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """The paths of each image and its label map, without hidden folders."""
        root = Path(self.data_prefix.get("img_path", ""))
        return [info for info in super().load_data_list() if not is_hidden(info["img_path"], root)]

    def prepare_data(self, idx: int) -> dict:
        """A prepared image; InputError if its label map contains a label outside the classes."""
        item = super().prepare_data(idx)
        if "gt_sem_seg" in getattr(item["data_samples"], "_data_fields", ()):
            labels = item["data_samples"].gt_sem_seg.data.unique().tolist()
            shifted = [label + (self.reduce_zero_label and label < 255) for label in labels]
            _check_labels(self.get_data_info(idx)["seg_map_path"], shifted, self.metainfo, self.reduce_zero_label)
        return item


def _check_labels(path: str | Path, labels: list[int], metainfo: dict, shift: bool) -> None:
    known = len(metainfo["classes"])
    odd = [label for label in labels if known + shift <= label < 255]
    if odd:
        raise InputError(
            f"label map {str(path)!r} holds the label {odd[0]}; expected 0 to {known - 1 + shift} or 255, "
            f"as the data set has {known} classes"
        )


def check_label_maps(settings: dict, cfg: Config) -> None:
    """Checks the label maps of an mmseg data set, each against its image.

    Raises:
        InputError: a folder is missing or empty, or has a hidden folder whose images mmseg's own data sets would read;
            an image has no map, or one of another size, in colour, turned, or with labels outside the classes; no map
            shows two classes, as maps of 0 and 255 do for two.
    """
    kind = DATASETS.get(f"{cfg.default_scope}.{settings['type']}")
    metainfo = {**kind.METAINFO, **(settings.get("metainfo") or {})}
    shift = settings.get("reduce_zero_label", kind.__name__ == "ADE20KDataset")
    endings = settings.get("img_suffix", ".jpg"), settings.get("seg_map_suffix", ".png")
    root, prefix, names = Path(settings.get("data_root") or ""), settings.get("data_prefix", {}), []
    if not metainfo.get("classes"):
        return
    check_heads(cfg.model, metainfo["classes"])
    folders = [root / prefix.get(key, "") for key in ("img_path", "seg_map_path")]
    for folder, ending in zip(folders, endings, strict=True):
        existing_folder(folder, "expected images and label maps of equal names", root)
        names.append({str(f.relative_to(folder)).removesuffix(ending) for f in find_files(folder, (ending,))})
    if not settings.get("ann_file") and not issubclass(kind, LabelMaps):
        for path in folders[0].rglob(f"*{endings[0]}"):
            if is_hidden(path.parent, folders[0]):
                raise InputError(f"{kind.__name__} would read {str(path)!r} of a hidden folder; remove the folder")
    if listed := settings.get("ann_file"):
        names[0] = set(existing_file("ann_file", str(root / listed)).read_text().split())
    if not names[0]:
        raise InputError(f"data folder {str(folders[0])!r} holds no image; expected files ending in {endings[0]}")
    alone = sorted(names[0] - names[1])
    if alone:
        raise InputError(
            f"image {str(folders[0] / (alone[0] + endings[0]))!r} has no label map ({len(alone)} such); expected "
            f"{str(folders[1] / (alone[0] + endings[1]))!r}"
        )
    pairs = [[f / (name + ending) for f, ending in zip(folders, endings, strict=True)] for name in sorted(names[0])]
    for image, label_map in pairs:
        size, expected = image_size(label_map, "label map"), image_size(image)
        if size != expected:
            found, said = (f"{w} x {h}" for h, w in (size, expected))
            raise InputError(f"label map {str(label_map)!r} is {found}; expected {said} as its image {str(image)!r}")
    seen, files = set(), spread([label_map for _, label_map in pairs])
    for i, path in enumerate(files):
        if i >= ENOUGH and len(seen - {255}) > 1:
            break
        labels = np.bincount(read_labels(path).ravel(), minlength=256).nonzero()[0].tolist()
        _check_labels(path, labels, metainfo, shift)
        seen |= {label for label in labels if not (shift and label == 0)}
    if len(seen - {255}) < 2 and (255 in seen or not settings.get("test_mode")):
        raise InputError(
            f"label map {str(files[0])!r} and all others hold the labels {sorted(seen)} alone; expected two of the "
            f"{len(metainfo['classes'])} classes' at least, as 255 is ignored"
        )


CHECKS["BaseSegDataset"] = check_label_maps


class _OfImages(nn.Module):
    """A model of OpenMMLab's as a function of normalised images ``(B, 3, H, W)``, for `linzoo export`."""

    def __init__(self, model: Any, cfg: Config):
        super().__init__()
        self.model, given = model, model.data_preprocessor
        scales = [step.scale for step in cfg.test_dataloader.dataset.pipeline if step.get("scale")]
        sides = getattr(given, "size", None) or next(iter(scales), (512, 512))[::-1]
        step = getattr(given, "pad_size_divisor", None) or getattr(given, "size_divisor", None) or 1
        size = [-(-side // step) * step for side in sides]
        mean, std = [0.0] * 3, [1 / 255] * 3
        if hasattr(given, "mean"):
            mean, std = ((x.flatten() / 255).tolist() for x in (given.mean, given.std))
        order = "RGB" if getattr(given, "_channel_conversion", True) else "BGR"  # what the pipeline loads is BGR
        self.pretrained_cfg = dict(architecture=type(model).__name__, order=order)
        self.pretrained_cfg |= dict(input_size=(3, *size), mean=mean, std=std)


class _Logits(_OfImages):
    """An mmseg model: logits ``(B, classes, H, W)`` at the images' size."""

    def forward(self, x: Tensor) -> Tensor:
        options = dict(mode="bilinear", align_corners=self.model.align_corners)
        return F.interpolate(self.model(x), x.shape[2:], **options)


class _Candidates(_OfImages):
    """An mmdet model of one stage: boxes ``(B, N, 4)`` and scores ``(B, N, classes)`` of all N anchors, before NMS."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.bbox_head
        maps = head(self.model.extract_feat(x))
        logits, deltas = (
            torch.cat([y.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels) for y in levels], 1)
            for levels, channels in zip(maps, (head.cls_out_channels, head.bbox_coder.encode_size), strict=True)
        )
        sizes = [y.shape[2:] for y in maps[0]]
        anchors = torch.cat(head.prior_generator.grid_priors(sizes, x.dtype, x.device))
        boxes = head.bbox_coder.decode(anchors.repeat(x.shape[0], 1), deltas.flatten(0, 1))
        if head.bbox_coder.clip_border:  # here, as mmdet's own way writes into views and fixes the size
            height, width = x.shape[2:]
            clipped = [boxes[:, i].clamp(0, side) for i, side in enumerate((width, height, width, height))]
            boxes = torch.stack(clipped, 1)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        return boxes.view(*logits.shape[:2], 4), scores


class DenseTask(Task):
    """Results per pixel or per object, drawn by OpenMMLab's visualizer."""

    kinds, tables = ("backbone", "adopted", "pyramid"), True
    visualizer: ClassVar[str]

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: its path, its picture and what the task finds; pictures and label maps are PNG files."""
        scope, settings = job.cfg.default_scope, job.cfg.test_dataloader.dataset
        with DefaultScope.overwrite_default_scope(scope):
            visualizer = VISUALIZERS.build(dict(type=job.task.visualizer, name=str(job.out)))
            dataset = DATASETS.get(f"{scope}.{settings.type}")
            visualizer.dataset_meta = {**dataset.METAINFO, **settings.get("metainfo", {})}
            drawn, labels, results = job.place("drawn", ".png"), job.place("labels", ".png"), []
            samples = (sample.cpu() for batch in job.batches(1) for sample in self.test_step(batch))
            for i, (path, sample) in enumerate(zip(job.inputs, samples, strict=True)):
                found = job.task.found(sample, visualizer.dataset_meta["classes"], labels[i], job.options)
                visualizer.add_datasample(
                    "", read_rgb(path), sample, draw_gt=False, show=False, **job.task.drawing(job.options)
                )
                save_image(visualizer.get_image(), drawn[i])
                results.append({"path": str(path), "drawn": str(drawn[i]), **found})
        return results


class SegmentationTask(DenseTask):
    """mmseg's segmenters: a label map, and each class's share of the pixels."""

    visualizer = "SegLocalVisualizer"

    def exported(self, cfg: Config) -> nn.Module:
        """The logits of each class at the images' size."""
        return _Logits(self, cfg)

    @staticmethod
    def found(sample: Any, classes: tuple[str, ...], file: Path, options: argparse.Namespace) -> dict:
        """The written label map's file, and the shares."""
        labels = sample.pred_sem_seg.data[0].numpy().astype(np.uint8)
        save_image(labels, file)
        shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
        named = zip(classes, shares, strict=True)
        return {"labels": str(file), "shares": {name: float(share) for name, share in named if share}}

    @staticmethod
    def drawing(options: argparse.Namespace) -> dict:
        """How the visualizer draws."""
        return {"with_labels": False}


class DetectionTask(DenseTask):
    """mmdet's detectors: objects with label, score, box (x1, y1, x2, y2) and, if there are masks, area in pixels."""

    visualizer = "DetLocalVisualizer"

    def exported(self, cfg: Config) -> nn.Module:
        """Boxes and scores before NMS; InputError for detectors of two stages, or with another head."""
        head = type(getattr(self, "bbox_head", None)).__name__
        if head not in (known := ("RetinaHead", "RTMDetHead", "RTMDetSepBNHead")):
            raise InputError(
                f"model.type={type(self).__name__!r} cannot be exported; expected a detector of one stage with the "
                f"head {', '.join(known)}, such as 'det/retinanet_efficientvim_m4_1x_coco'"
            )
        return _Candidates(self, cfg)

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the score threshold."""
        parser.add_argument("--threshold", type=float, default=0.5, help="leave out objects with a lower score")

    @staticmethod
    def found(sample: Any, classes: tuple[str, ...], file: Path, options: argparse.Namespace) -> dict:
        """The objects."""
        found = sample.pred_instances
        sample.pred_instances = found = found[found.scores >= options.threshold]
        objects = [
            dict(label=classes[label], score=score, box=box)
            for label, score, box in zip(
                found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), strict=True
            )
        ]
        areas = torch.as_tensor(found.masks).flatten(1).sum(1).tolist() if "masks" in found else []
        for entry, area in zip(objects, areas, strict=False):
            entry["area"] = area
        return {"objects": objects}

    @staticmethod
    def drawing(options: argparse.Namespace) -> dict:
        """How the visualizer draws."""
        return {"pred_score_thr": options.threshold}


# The task of a model with a backbone, by the package in the config's `default_scope`.
DENSE = {"mmseg": SegmentationTask, "mmdet": DetectionTask, "mmpretrain": BackboneClassifier}
