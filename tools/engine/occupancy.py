"""Semantic occupancy: SemanticKITTI's voxels, a timm model to train that completes and labels them, and its metrics."""

import math
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
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .errors import InputError
from .files import write_atomically
from .task import Job, TimmModel

IGNORE = 255
GRID = (256, 256, 32)  # voxels along x, y and z
# For each class of scene completion, from 1 on, SemanticKITTI's labels. A moving object has the class of a parked one.
# Predictions are written as the first label.
CLASSES = {
    "car": (10, 252),
    "bicycle": (11,),
    "motorcycle": (15,),
    "truck": (18, 258),
    "other-vehicle": (20, 13, 16, 256, 257, 259),
    "person": (30, 254),
    "bicyclist": (31, 253),
    "motorcyclist": (32, 255),
    "road": (40, 60),
    "parking": (44,),
    "sidewalk": (48,),
    "other-ground": (49,),
    "building": (50,),
    "fence": (51,),
    "vegetation": (70,),
    "trunk": (71,),
    "terrain": (72,),
    "pole": (80,),
    "traffic-sign": (81,),
}
UNLABELLED = (1, 52, 99)  # outliers, other structures and objects: not used in training


def learning_map() -> np.ndarray:
    """Target for each of SemanticKITTI's labels ``(65536,)``: 0 for empty, a class, or 255; -1 for unknown labels."""
    table = np.full(65536, -1, np.int16)
    table[0], table[list(UNLABELLED)] = 0, IGNORE
    for index, labels in enumerate(CLASSES.values(), 1):
        table[list(labels)] = index
    return table


def find_scenes(data_root: str | Path, sequences: Sequence[str], labelled: bool = True) -> list[Path]:
    """SemanticKITTI's voxel files `sequences/<sequence>/voxels/<scene>.bin`, sorted.

    InputError if a sequence is missing or empty, or a scene lacks a required `.label` or `.invalid` file.
    """
    found = []
    for sequence in sequences:
        folder = Path(data_root, "sequences", str(sequence).zfill(2), "voxels")  # a command line turns "08" into 8
        scenes = sorted(folder.glob("*.bin"))
        if not scenes:
            raise InputError(f"voxel folder {str(folder)!r} not found or empty; expected SemanticKITTI's <scene>.bin")
        for scene in scenes if labelled else ():
            for ending in (".label", ".invalid"):
                if not scene.with_suffix(ending).is_file():
                    raise InputError(f"voxels {str(scene)!r} are alone; expected {scene.stem + ending!r} beside them")
        found += scenes
    return found


def read_voxels(path: Path, grid: Sequence[int], dtype: type, per_byte: int = 1) -> np.ndarray:
    """A file's values, checked against the number of voxels in the grid, `per_byte` values in a byte."""
    expected = math.prod(grid) // per_byte * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise InputError(f"voxels {str(path)!r} have {size} bytes; expected {expected} of {tuple(grid)} voxels")
        values = np.fromfile(path, dtype)
    except OSError as e:
        raise InputError(f"cannot read voxels {str(path)!r} ({e})") from e
    return values if per_byte > 1 else values.reshape(grid)


def read_bits(path: Path, grid: Sequence[int]) -> np.ndarray:
    """A file with one bit per voxel, the first in the highest bit of its byte, as bool ``(X, Y, Z)``."""
    return np.unpackbits(read_voxels(path, grid, np.uint8, per_byte=8)).reshape(grid).astype(bool)


def read_sweep(path: Path, grid: Sequence[int]) -> Tensor:
    """The voxels that a sweep hit, float32 ``(1, X, Y, Z)`` of 0 and 1; InputError if there are none."""
    occupied = read_bits(path, grid)
    if not occupied.any():
        raise InputError(f"voxels {str(path)!r} are all empty; expected some that the sweep hit")
    return torch.from_numpy(occupied.astype(np.float32))[None]


@mmengine.registry.DATASETS.register_module()
class VoxelScenes(Dataset):
    """SemanticKITTI's scenes, `sequences/<sequence>/voxels/<scene>.{bin,label,invalid}`.

    An item is `inputs`, float32 ``(1, X, Y, Z)``, 1 where the sweep hit a voxel, `path`, and if labelled `targets`,
    uint8 ``(X, Y, Z)``: 0 for empty voxels, 1 to 19 for `CLASSES`, 255 for unknown or invisible voxels.

    Args:
        data_root: folder of `sequences`.
        sequences: names of the sequences to read.
        grid: voxels along x, y and z.
        labelled: whether labels are read; the hidden test sequences have none.

    Raises:
        InputError: a sequence or a file is missing, of the wrong size, empty, or holds an unknown label.
    """

    METAINFO = {"classes": ("empty", *CLASSES)}

    def __init__(self, data_root: str, sequences: Sequence[str], grid: Sequence[int] = GRID, labelled: bool = True):
        self.files = find_scenes(data_root, sequences, labelled)
        self.grid, self.labelled, self.learning_map = tuple(grid), labelled, learning_map()
        self.metainfo = self.METAINFO

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path = self.files[index]
        item = {"inputs": read_sweep(path, self.grid), "path": str(path)}
        if self.labelled:
            file = path.with_suffix(".label")
            labels = read_voxels(file, self.grid, np.uint16)
            targets = self.learning_map[labels]
            if (targets < 0).any():
                odd = int(labels[targets < 0][0])
                raise InputError(f"labels {str(file)!r} hold {odd}; expected labels of SemanticKITTI")
            targets[read_bits(path.with_suffix(".invalid"), self.grid)] = IGNORE
            item["targets"] = torch.from_numpy(targets.astype(np.uint8))
        return item

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if a sequence is missing or empty, or a scene lacks its labels."""
        find_scenes(settings["data_root"], settings["sequences"], settings.get("labelled", True))


def coarse_labels(targets: Tensor, stride: int, classes: int) -> Tensor:
    """Labels of cells with sides of `stride` voxels: the most frequent class of their occupied voxels; else 0 if a
    voxel is known to be empty, else 255.

    Args:
        targets: ``(B, X, Y, Z)``, 0 for empty, 255 for unknown.
        classes: number of classes, including 0.

    Returns:
        ``(B, X / stride, Y / stride, Z / stride)``.
    """
    size = targets.shape[0], *(n // stride for n in targets.shape[1:])
    cells = math.prod(size)
    cell = torch.arange(cells, device=targets.device).view(size)
    for axis in (1, 2, 3):
        cell = cell.repeat_interleave(stride, axis)
    known = targets != IGNORE
    votes = torch.bincount(cell[known] * classes + targets[known].long(), minlength=cells * classes)
    votes = votes.view(-1, classes)
    most, label = votes[:, 1:].max(1)
    label = torch.where(most > 0, label + 1, torch.where(votes[:, 0] > 0, 0, IGNORE))
    return label.view(size)


def occupancy_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Lovasz-softmax loss (Berman et al., 2018) over all voxels except those with label 255.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)``.
        weights: of the classes in the cross-entropy ``(K,)``.
    """
    from mmseg.models.losses import LovaszLoss

    known = labels != IGNORE
    logits, labels = logits[known].float(), labels[known].long()
    if not len(labels):
        return logits.sum(), logits.sum()
    lovasz = LovaszLoss(reduction="none")
    maps = logits.t()[None, :, :, None]  # (1, K, N, 1)
    return F.cross_entropy(logits, labels, weights), lovasz(maps, labels[None, :, None])


@MODELS.register_module()
class SceneCompleter(TimmModel):
    """A semantic occupancy model to train.

    The loss is cross-entropy plus Lovasz-softmax, summed over: the voxels, three times; the classes of occupied cells
    at strides 2, 4 and 8; empty and occupied cells at the same strides.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.OccRWKV`; other arguments as in `TimmModel`.
        class_counts: voxels of each class in a data set, empty ones first. The classes' weights in the cross-entropies
            are ``1 / log(count + 0.001)``; None for equal weights.

    Raises:
        InputError: as in `TimmModel`; the number of classes differs between model and counts.
    """

    kinds, needs = ("occupancy",), "branches"
    inputs, read = ("voxel file", (".bin",)), staticmethod(Path.read_bytes)

    def __init__(self, model_name: str, *args, class_counts: Sequence[float] | None = None, **kwargs):
        super().__init__(model_name, *args, **kwargs)
        if class_counts is not None and (len(class_counts) != self.model.num_classes or min(class_counts) <= 1):
            raise InputError(f"class_counts={class_counts}; expected {self.model.num_classes} numbers above 1")
        self.class_counts = class_counts

    def forward(self, inputs: Tensor, targets: Any = None, path: Any = None, mode: str = "tensor") -> Any:
        """Voxels ``(B, 1, X, Y, Z)`` to logits, to the losses, or to a list of pairs (classes, targets) on the CPU."""
        if mode == "loss":
            return self.losses(*self.model.branches(inputs), targets)
        logits = self.model(inputs)
        return logits if mode == "tensor" else list(zip(logits.argmax(1).cpu(), targets.cpu(), strict=True))

    def losses(self, logits: Tensor, semantic: Sequence, completion: Sequence, targets: Tensor) -> dict[str, Any]:
        """The losses for the output of the model's `branches` and targets ``(B, X, Y, Z)``."""
        weights = None
        if self.class_counts is not None:
            weights = 1 / torch.log(torch.tensor(self.class_counts, device=logits.device) + 0.001)
        total = sum(occupancy_loss(logits.movedim(1, -1).flatten(0, 3), targets.flatten(), weights))
        losses = {"loss_voxels": 3 * total}
        for i, ((of_cells, where), of_grid) in enumerate(zip(semantic, completion, strict=True)):
            stride = 2 ** (i + 1)
            labels = coarse_labels(targets, stride, logits.shape[1])
            # Cells that the sweep hit have a class or an unknown one; 0 is not among their classes.
            classes = labels[tuple(where.t())] - 1
            classes = classes.where((classes >= 0) & (classes < IGNORE - 1), IGNORE)
            losses[f"loss_semantic{stride}"] = sum(
                occupancy_loss(of_cells, classes, None if weights is None else weights[1:])
            )
            occupied = torch.where(labels == IGNORE, IGNORE, (labels > 0).long())
            losses[f"loss_completion{stride}"] = sum(
                occupancy_loss(of_grid.movedim(1, -1).flatten(0, 3), occupied.flatten())
            )
        return losses

    def predict_files(self, job: Job) -> list[dict]:
        """For each scene: its path, the file of its labels in SemanticKITTI's format, and the voxels of each label."""
        names, written = ("empty", *CLASSES), np.array([0, *(labels[0] for labels in CLASSES.values())], np.uint16)
        if self.model.num_classes != len(names):
            raise InputError(f"the model has {self.model.num_classes} classes; expected SemanticKITTI's {len(names)}")
        grid = job.cfg.test_dataloader.dataset.get("grid", GRID)
        device, results = next(self.parameters()).device, []
        for path, file in zip(job.inputs, job.place("labels", ".label"), strict=True):
            classes = self(read_sweep(path, grid)[None].to(device)).argmax(1)[0].cpu().numpy()
            write_atomically(file, written[classes].tofile)
            counts = np.bincount(classes.ravel(), minlength=len(names)).tolist()
            facts = {"grid": classes.shape, "voxels": dict(zip(names, counts, strict=True))}
            results.append({"path": str(path), "labels": str(file), **facts})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The scene from above: for each column, the class of its highest voxel that is not empty."""
        classes = learning_map()[np.fromfile(result["labels"], np.uint16).reshape(result["grid"])]
        top = classes.shape[2] - 1 - (classes[..., ::-1] > 0).argmax(2)
        axis.imshow(np.take_along_axis(classes, top[..., None], 2)[..., 0], cmap="tab20", vmin=0, vmax=len(CLASSES))


@METRICS.register_module()
class OccupancyMetric(BaseMetric):
    """Scene completion's metrics in percent, from one confusion matrix over all known voxels of all scenes.

    "IoU", "precision" and "recall" of occupied voxels whatever their class, and "mIoU", the mean IoU of the classes
    without "empty". A class absent from both labels and predictions counts as 0, as in the benchmark.

    Args:
        num_classes: number of classes, including 0 for empty voxels.
    """

    default_prefix = "occupancy"

    def __init__(self, num_classes: int = 20, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Count the voxels of each scene."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        for predicted, true in data_samples:
            counts = multiclass_confusion_matrix(predicted, true.long(), self.num_classes, ignore_index=IGNORE)
            self.results.append(counts.double())

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of the summed counts."""
        counts = torch.stack(results).sum(0)  # true class, predicted class
        both, true, found = counts[1:, 1:].sum(), counts[1:].sum(), counts[:, 1:].sum()
        hits = counts.diag()[1:]
        classes = hits / (counts.sum(0) + counts.sum(1) - counts.diag())[1:].clamp(min=1)
        values = {
            "IoU": both / (true + found - both).clamp(min=1),
            "mIoU": classes.mean(),
            "precision": both / found.clamp(min=1),
            "recall": both / true.clamp(min=1),
        }
        return {name: 100 * value.item() for name, value in values.items()}
