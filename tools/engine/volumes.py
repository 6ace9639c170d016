"""Segmentation of medical images and volumes in NIfTI files by MONAI: data, a timm model to train, Dice and HD95.

MONAI and nibabel are the optional extra `medical`; they are imported at first use.
"""

import argparse
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

from ..make_data import MAKERS
from .data import existing_folder, first_line
from .errors import InputError
from .files import write_atomically
from .images import find_files
from .task import Job, TimmModel

ENDINGS = (".nii.gz", ".nii")
FIRST_CHANNEL = "_0000"  # how nnU-Net numbers the channels of a case, one per file


def medical(module: str) -> Any:
    """A module of MONAI or nibabel; InputError if the extra is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        line = 'medical volumes need MONAI and nibabel; expected `pip install "linzoo[medical]"`'
        raise InputError(f"{module} cannot be imported ({first_line(e)}): {line}") from e


class Volume(NamedTuple):
    """The content of a NIfTI file.

    Attributes:
        values: ``(C, D, H, W)``, or ``(C, H, W)`` for an image: slices, rows, columns, the reverse of the file's axes.
        spacing: millimetres between voxels along D, H and W.
        affine: of the file, from its own axes to millimetres.
    """

    values: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray


def stem_of(path: Path) -> str:
    """A file's name without its ending and its channel number."""
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name.removesuffix(FIRST_CHANNEL)


def channels_of(path: Path) -> list[Path]:
    """The files of a case's channels: `case_0000.nii.gz`, `case_0001.nii.gz` ..., or the one file."""
    ending = next((e for e in ENDINGS if path.name.endswith(e)), "")
    stem = path.name.removesuffix(ending)
    if not stem.endswith(FIRST_CHANNEL):
        return [path]
    return sorted(path.parent.glob(f"{stem.removesuffix(FIRST_CHANNEL)}_[0-9][0-9][0-9][0-9]{ending}"))


def read_file(path: str | Path, what: str = "volume") -> Volume:
    """A NIfTI file with two axes, three, or four with the channels last.

    Raises:
        InputError: it cannot be read, has other axes, or its header gives no spacing.
    """
    nibabel = medical("nibabel")
    try:
        file: Any = nibabel.load(str(path))
        affine, values = np.asarray(file.affine, np.float64), np.asarray(file.dataobj)
        with medical("nibabel.openers").ImageOpener(str(path)) as opened:  # loading repairs a header silently
            pixdim = type(file.header).from_fileobj(opened, check=False)["pixdim"]
    except Exception as e:  # a damaged file raises one of a dozen kinds
        raise InputError(f"cannot read {what} {str(path)!r}; expected a whole NIfTI file ({first_line(e)})") from e
    axes = min(values.ndim, 3)
    if values.ndim not in (2, 3, 4) or 0 in values.shape:
        raise InputError(
            f"{what} {str(path)!r} is of shape {values.shape}; expected 2 or 3 axes, or channels as a fourth"
        )
    spacing = tuple(float(z) for z in pixdim[1 : axes + 1])
    if not all(math.isfinite(z) and z > 0 for z in spacing):
        said = ", ".join(f"{z:g}" for z in spacing)
        raise InputError(
            f"{what} {str(path)!r}: its header gives no voxel spacing (pixdim {said}); expected positive millimetres"
        )
    values = values[None] if values.ndim < 4 else np.moveaxis(values, -1, 0)
    values = values.transpose(0, *range(axes, 0, -1))
    if axes == 3 and values.shape[1] == 1:  # an image saved as one slice
        values, spacing = values[:, 0], spacing[:2]
    return Volume(np.ascontiguousarray(values), spacing[::-1], affine)


def read_case(path: str | Path) -> Volume:
    """A case with one or several channels, float32; InputError as in `read_file`, or if channels differ in size."""
    files = channels_of(Path(path))
    parts = [read_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.values.shape != parts[0].values.shape or part.spacing != parts[0].spacing:
            raise InputError(
                f"volume {str(file)!r} is {part.values.shape[1:]} with spacing {part.spacing}; expected "
                f"{parts[0].values.shape[1:]} and {parts[0].spacing} as its first channel"
            )
        if not np.isfinite(part.values).all():
            raise InputError(f"volume {str(file)!r} holds values that are not finite; expected numbers")
    return parts[0]._replace(values=np.concatenate([part.values for part in parts]).astype(np.float32))


def read_label(path: str | Path, case: Volume, num_classes: int) -> np.ndarray:
    """The classes of a case's voxels, uint8 ``(1, D, H, W)``; InputError if they do not fit it."""
    found = read_file(path, "label")
    values = found.values
    if values.shape[1:] != case.values.shape[1:] or len(values) != 1:
        raise InputError(f"label {str(path)!r} is {values.shape[1:]}; expected {case.values.shape[1:]} as its volume")
    if not np.allclose(found.spacing, case.spacing, rtol=1e-3):
        raise InputError(f"label {str(path)!r} has spacing {found.spacing}; expected {case.spacing} as its volume")
    odd = values[(values < 0) | (values >= num_classes) | (values != np.round(values))]
    if odd.size:
        raise InputError(f"label {str(path)!r} holds {odd.flat[0]:g}; expected classes from 0 to {num_classes - 1}")
    return values.astype(np.uint8)


def find_cases(root: Path, folders: Sequence[str]) -> list[tuple[Path, Path]]:
    """Volumes and labels of equal names in two folders; InputError if one is missing or empty, or a file is alone."""
    expected = f"expected {folders[0]}/ and {folders[1]}/ with NIfTI files of equal names"
    images, labels = (find_files(existing_folder(root / name, expected, root), ENDINGS, deep=False) for name in folders)
    firsts = {stem_of(file): file for file in images if channels_of(file)[0] == file and _is_first(file)}
    targets = {stem_of(file): file for file in labels}
    if not firsts:
        raise InputError(f"data folder {str(root / folders[0])!r} holds no volume; {expected}")
    for name, here, there, other in (
        ("volume", firsts, targets, folders[1]),
        ("label", targets, firsts, folders[0]),
    ):
        if alone := sorted(here.keys() - there.keys()):
            at = str(root / other)
            raise InputError(f"{name} {str(here[alone[0]])!r} is alone; expected a file named {alone[0]!r} in {at!r}")
    return [(firsts[stem], targets[stem]) for stem in sorted(firsts)]


def _is_first(path: Path) -> bool:
    """Whether a file is a case's first channel, or its only file."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    number = stem.rpartition("_")[2]
    return not (len(number) == 4 and number.isdigit()) or number == "0000"


def prepare(values: np.ndarray, case: Volume, spacing: Sequence[float] | None, mode: str) -> Tensor:
    """Values of a case, resampled to a spacing by MONAI; None keeps their spacing."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if spacing is None or np.allclose(spacing, case.spacing, rtol=1e-3):
        return tensor
    if len(spacing) != len(case.spacing):
        raise InputError(f"spacing={tuple(spacing)}: expected {len(case.spacing)} numbers, one for each axis")
    affine = torch.diag(torch.tensor([*case.spacing, 1.0], dtype=torch.float64))
    meta = medical("monai.data").MetaTensor(tensor.float(), affine=affine)
    resample = medical("monai.transforms").Spacing(pixdim=tuple(spacing), mode=mode, padding_mode="border")
    return torch.as_tensor(resample(meta)).as_subclass(Tensor)


def normalise(values: Tensor) -> Tensor:
    """Each channel with mean 0 and deviation 1."""
    return medical("monai.transforms").NormalizeIntensity(channel_wise=True)(values).as_subclass(Tensor)


@mmengine.registry.DATASETS.register_module()
class Volumes(Dataset):
    """NIfTI volumes and labels of equal names in two folders, in nnU-Net's layout.

    An item is `inputs`, float32 ``(C, D, H, W)``, normalised; `targets`, uint8 ``(1, D, H, W)``; `spacing`, `path`.
    With 2-D files there is no D.

    Args:
        data_root, data_prefix: where the two folders are.
        num_classes: classes, including the background.
        folders: names of the folders of volumes and of labels. `case_0000.nii.gz`, `case_0001.nii.gz` are channels.
        spacing: millimetres along D, H and W to resample to; None for the files' own.
        crop: size of the random training crops; None for whole volumes.
        foreground: share of the crops that are around a voxel of the foreground.
        flip: axes along which crops are flipped at random.
        length: items per epoch, taken from the cases in turns; None for one per case.
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.

    Raises:
        InputError: a folder or file is missing or does not fit the others; the extra `medical` is not installed.
    """

    def __init__(
        self,
        data_root: str,
        data_prefix: str = "",
        num_classes: int = 2,
        folders: Sequence[str] = ("images", "labels"),
        spacing: Sequence[float] | None = None,
        crop: Sequence[int] | None = None,
        foreground: float = 0.33,
        flip: Sequence[int] = (0, 1, 2),
        length: int | None = None,
        make: str | None = None,
    ):
        if make and not Path(data_root).exists():
            MAKERS[make](data_root)
        self.cases = find_cases(Path(data_root, data_prefix), folders)
        self.num_classes, self.spacing = num_classes, spacing
        self.length = length or len(self.cases)
        self.augment = self.augmentation(crop, foreground, flip) if crop else None

    @staticmethod
    def augmentation(crop: Sequence[int], foreground: float, flip: Sequence[int]) -> Callable[[dict], Any]:
        """MONAI's random crop, flips, and changes of brightness and noise."""
        t, keys = medical("monai.transforms"), ["inputs", "targets"]
        ratio = dict(pos=foreground, neg=1 - foreground)
        return t.Compose(
            [
                t.SpatialPadd(keys, tuple(crop)),
                t.RandCropByPosNegLabeld(keys, "targets", tuple(crop), num_samples=1, **ratio),
                *(t.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in flip if axis < len(crop)),
                t.RandGaussianNoised("inputs", prob=0.1, std=0.1),
                t.RandScaleIntensityd("inputs", factors=0.25, prob=0.15),
                t.RandShiftIntensityd("inputs", offsets=0.1, prob=0.15),
            ]
        )

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict:
        image, label = self.cases[index % len(self.cases)]
        case = read_case(image)
        item = {
            "inputs": normalise(prepare(case.values, case, self.spacing, "bilinear")),
            "targets": prepare(read_label(label, case, self.num_classes), case, self.spacing, "nearest").byte(),
        }
        if self.augment is not None:
            [item] = self.augment(item)
            item = {key: torch.as_tensor(item[key]).as_subclass(Tensor) for key in ("inputs", "targets")}
        spacing = torch.tensor(self.spacing or case.spacing, dtype=torch.float64)
        return {**item, "targets": item["targets"].byte(), "spacing": spacing, "path": str(image)}

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if a file is missing or alone, or the first label does not fit."""
        root = Path(settings["data_root"], settings.get("data_prefix", ""))
        for image, label in find_cases(root, settings.get("folders", ("images", "labels")))[:1]:
            read_label(label, read_case(image), settings.get("num_classes", 2))


@MODELS.register_module()
class VolumeSegmenter(TimmModel):
    """A model of volumes (or of images, in 2-D) to train with Dice and cross-entropy, at all its heads.

    Heads have weights 1, 1/2, 1/4 ..., the last one of several 0, divided by their sum, as in nnU-Net. Whole volumes
    are segmented in windows that overlap and fade into each other.

    Args:
        model_name: timm name of a model of kind "volume" or "segmentation"; other arguments as in `TimmModel`.
        window: size of the windows.
        overlap: overlap of neighbouring windows, as a share of their size.
        init_from: keywords of `timm.create_model` for a classifier that the model's `init_from_classifier` starts from.

    Raises:
        InputError: windows have another number of axes than the model; it cannot start from that classifier.
    """

    kinds, needs = ("volume", "segmentation"), "forward_deep"
    inputs, read = ("volume", ENDINGS), staticmethod(read_file)

    def __init__(
        self,
        model_name: str,
        *args,
        window: Sequence[int],
        overlap: float = 0.5,
        init_from: dict | None = None,
        **kwargs,
    ):
        super().__init__(model_name, *args, **kwargs)
        if len(window) != len(self.model.strides):
            raise InputError(f"window={tuple(window)}; expected {len(self.model.strides)} sides for {model_name!r}")
        if not 0 <= overlap < 1:
            raise InputError(f"overlap={overlap}; expected a share from 0 to below 1")
        self.window, self.overlap = tuple(window), overlap
        if init_from is not None:
            from .weights import create_model

            try:
                self.model.init_from_classifier(create_model(**init_from).state_dict())
            except (AttributeError, ValueError) as e:
                raise InputError(f"init_from={dict(init_from)}: {model_name!r} cannot start from it: {e}") from e

    def forward(
        self, inputs: Tensor, targets: Any = None, spacing: Any = None, path: Any = None, mode: str = "tensor"
    ) -> Any:
        """Volumes ``(B, C, D, H, W)`` to logits, to the loss, or to a list of (classes, targets, spacing)."""
        if mode == "predict":
            found = self.segment(inputs).argmax(1, keepdim=True).cpu()
            return list(zip(found, targets.cpu(), spacing.cpu(), strict=True))
        logits = self.run(inputs)
        if mode == "tensor":
            return logits
        return {
            "loss_dice_ce": self.loss([y.float() for y in (logits if isinstance(logits, list) else [logits])], targets)
        }

    def run(self, inputs: Tensor) -> Any:
        """Runs the model; inputs that it rejects are an InputError."""
        try:
            return self.model(inputs)
        except ValueError as e:
            raise InputError(str(e)) from e

    @staticmethod
    def loss(logits: list[Tensor], targets: Tensor) -> Tensor:
        """The weighted sum of MONAI's `DiceCELoss` over the heads."""
        losses = medical("monai.losses")
        weights = [0.5**i for i in range(len(logits))]
        weights[-1] *= len(weights) == 1
        of_head = losses.DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
        deep = losses.DeepSupervisionLoss(of_head, weights=[w / sum(weights) for w in weights])
        return deep(logits, targets.float())

    def segment(self, inputs: Tensor) -> Tensor:
        """Volumes ``(B, C, D, H, W)`` of any size to logits, window by window."""
        infer = medical("monai.inferers").sliding_window_inference
        return infer(inputs, self.window, 1, lambda x: self.run(x).float(), overlap=self.overlap, mode="gaussian")

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds no options: the config sets windows and overlap."""

    @classmethod
    def find(cls, path: str | None) -> list[Path]:
        """The volumes at `path`; for a case with several channels, the first file."""
        return [file for file in super().find(path) if _is_first(file)]

    def predict_files(self, job: Job) -> list[dict]:
        """For each case: path, a NIfTI file of the voxels' classes on its own grid, and each class's millilitres."""
        nibabel = medical("nibabel")
        device, results = next(self.parameters()).device, []
        spacing = job.cfg.test_dataloader.dataset.get("spacing")
        for path, file in zip(job.inputs, job.place("labels", ".nii.gz"), strict=True):
            case = read_case(path)
            if len(case.values) != self.model.in_chans:
                raise InputError(
                    f"volume {str(path)!r} has {len(case.values)} channels; expected {self.model.in_chans}"
                )
            if len(case.spacing) != len(self.window):
                raise InputError(f"volume {str(path)!r} has {len(case.spacing)} axes; expected {len(self.window)}")
            values = normalise(prepare(case.values, case, spacing, "bilinear"))
            logits = self.segment(values[None].to(device)).cpu()
            size = case.values.shape[1:]
            if logits.shape[2:] != size:
                logits = F.interpolate(logits, size, mode="trilinear" if len(size) == 3 else "bilinear")
            classes = logits[0].argmax(0).to(torch.uint8).numpy()
            image = nibabel.Nifti1Image(classes.transpose(*range(classes.ndim)[::-1]), case.affine)
            image.header.set_zooms(case.spacing[::-1])

            def save(partial: Path, image: Any = image) -> None:
                named = partial.with_name(f"{partial.name}.nii.gz")  # nibabel takes the format from the name
                nibabel.save(image, str(named))
                named.replace(partial)

            write_atomically(file, save)
            voxel = math.prod(case.spacing) / 1000
            counts = np.bincount(classes.ravel(), minlength=self.model.num_classes)
            results.append({"path": str(path), "labels": str(file), "ml": [float(n * voxel) for n in counts[1:]]})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The slice with the most foreground, with its classes on top."""
        case, label = read_case(result["path"]), read_file(result["labels"], "label").values[0]
        values = case.values[0]
        if label.ndim == 3:
            at = int((label > 0).sum((1, 2)).argmax())
            values, label = values[at], label[at]
        axis.imshow(values, cmap="gray")
        axis.imshow(np.ma.masked_equal(label, 0), cmap="tab10", alpha=0.5, vmin=0, vmax=9)


@METRICS.register_module()
class VolumeMetric(BaseMetric):
    """Dice in percent and HD95 in millimetres, as means over cases and foreground classes, by MONAI.

    Dice leaves out classes missing from a label; HD95 also those missing from the prediction. "found" is the share, in
    percent, of the labels' classes for which anything was predicted.
    """

    default_prefix = "volume"

    def __init__(self, num_classes: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """The metrics of each case and class."""
        metrics = medical("monai.metrics")
        for found, true, spacing in data_samples:
            a, b = (F.one_hot(x[0].long(), self.num_classes).movedim(-1, 0)[None] for x in (found, true))
            both = a.flatten(2).any(2)[0, 1:] & b.flatten(2).any(2)[0, 1:]
            dice = metrics.compute_dice(a, b, include_background=False)[0]
            distance = torch.full_like(dice, torch.nan)
            if both.any():
                where = [0, *(both.nonzero()[:, 0] + 1).tolist()]
                measure = metrics.compute_hausdorff_distance
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # MONAI uses functions that it deprecates
                    found95 = measure(a[:, where], b[:, where], percentile=95, spacing=spacing.tolist())
                distance[both] = found95[0].to(dice)
            has = b.flatten(2).any(2)[0, 1:]
            self.results.append({"Dice": 100 * dice, "HD95": distance, "found": 100 * both[has].float()})

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means."""
        return {key: torch.cat([r[key] for r in results]).nanmean().item() for key in results[0]}
