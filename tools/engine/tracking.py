"""Segmentation of clips, frame by frame: layouts, a model with a state to train, metrics, streams of any length."""

import argparse
import csv
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from torchvision.transforms.v2 import functional as transforms

from .clips import ENDINGS, find_readable, stream_frames
from .data import existing_folder, in_layout
from .errors import InputError
from .files import save_image
from .images import find_files, read_labels, read_rgb
from .promptable import sample, uncertain_points
from .segmenter import dice_loss, draw_outline
from .task import Job, TimmModel
from .volumes import medical, read_file

UNKNOWN = 255  # a pixel of unknown class
FRAMES = ("ends", "all")


class Clip(NamedTuple):
    """A clip on disk.

    Attributes:
        frames: uint8 ``(T, H, W)``.
        masks: of some frames, by index, uint8 ``(H, W)`` of 0 and 1.
        spacing: millimetres between rows and between columns; 1 if not known.
    """

    frames: np.ndarray
    masks: dict[int, np.ndarray]
    spacing: tuple[float, float] = (1.0, 1.0)


Reader = Callable[[], Clip]


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 2 else (pixels.astype(np.float32) @ (0.299, 0.587, 0.114)).round().astype(np.uint8)


def _folders(root: Path, part: str) -> dict[str, Reader]:
    """Clips as ``part/frames/<clip>/<frame>.png``, with masks of all or some frames as ``part/masks/<clip>/...``."""

    def reader(frames: Path, masks: Path) -> Reader:
        def read() -> Clip:
            files = find_files(frames, deep=False)
            named = {file.stem: file for file in find_files(masks, deep=False)}
            pixels = np.stack([_grey(read_rgb(file)) for file in files])
            found = {i: (read_labels(named[f.stem], "mask") > 0) for i, f in enumerate(files) if f.stem in named}
            for i, mask in found.items():
                if mask.shape != pixels.shape[1:]:
                    (h, w), (height, width) = mask.shape, pixels.shape[1:]
                    raise InputError(
                        f"mask {str(named[files[i].stem])!r} is {w} x {h}; expected {width} x {height} as its frame"
                    )
            return Clip(pixels, {i: mask.astype(np.uint8) for i, mask in found.items()})

        return read

    expected = "expected frames/ and masks/ with a folder of images for each clip"
    frames, masks = (existing_folder(root / part / name, expected, root) for name in ("frames", "masks"))
    found = {}
    for folder in sorted(path for path in frames.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not find_files(folder, deep=False):
            raise InputError(f"clip {str(folder)!r} holds no frame; {expected}")
        if not (masks / folder.name).is_dir() or not find_files(masks / folder.name, deep=False):
            raise InputError(f"clip {str(folder)!r} has no mask in {str(masks / folder.name)!r}; {expected}")
        found[folder.name] = reader(folder, masks / folder.name)
    return found


def _camus(root: Path, part: str) -> dict[str, Reader]:
    """CAMUS: ``patient*/patient*_{2CH,4CH}_half_sequence{,_gt}.nii.gz``; parts as in `database_split`."""

    def reader(file: Path, truth: Path) -> Reader:
        def read() -> Clip:
            image, label = read_file(file), read_file(truth, "label")
            if image.values.shape != label.values.shape:
                raise InputError(f"label {str(truth)!r} has another size than {str(file)!r}; expected equal ones")
            masks = {i: (mask == 1).astype(np.uint8) for i, mask in enumerate(label.values[0])}
            return Clip(image.values[0].clip(0, 255).round().astype(np.uint8), masks, tuple(image.spacing[1:]))

        return read

    expected = "expected CAMUS as it is distributed, patient folders beside database_split/"
    split = root / "database_split" / f"subgroup_{part}.txt"
    if not split.is_file():
        raise InputError(f"list of patients {str(split)!r} not found; {expected}")
    found = {}
    for patient in split.read_text().split():
        for view in ("2CH", "4CH"):
            stem = f"{patient}_{view}_half_sequence"
            files = [next(root.rglob(f"{stem}{end}.nii.gz"), None) for end in ("", "_gt")]
            if None in files:
                raise InputError(f"sequence {stem!r} not found below {str(root)!r}; {expected}")
            found[stem] = reader(*files)  # pyright: ignore[reportArgumentType]
    return found


def _echonet(root: Path, part: str) -> dict[str, Reader]:
    """EchoNet-Dynamic: ``Videos/*.avi``, `FileList.csv` with splits, `VolumeTracings.csv` with two frames' outlines."""

    def table(name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        path = root / name
        if not path.is_file():
            raise InputError(f"{str(path)!r} not found; expected EchoNet-Dynamic as it is distributed")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not set(columns) <= rows[0].keys():
            raise InputError(f"{str(path)!r} lacks columns; expected {', '.join(columns)}")
        return rows

    def reader(file: Path, outlines: dict[int, list[list[float]]]) -> Reader:
        def read() -> Clip:
            from skimage.draw import polygon

            first, last = min(outlines), max(outlines)
            frames = np.stack([_grey(f) for f in itertools.islice(stream_frames(file), first, last + 1)])
            if len(frames) <= last - first:
                raise InputError(f"video {str(file)!r} ends before frame {last}, which is outlined; expected it whole")
            masks = {}
            for place, chords in outlines.items():
                x1, y1, x2, y2 = np.array(chords[1:]).T  # the first chord is the long axis
                mask = np.zeros(frames.shape[1:], np.uint8)
                mask[polygon(np.r_[y1, y2[::-1]], np.r_[x1, x2[::-1]], mask.shape)] = 1
                masks[place - first] = mask
            return Clip(frames, masks)

        return read

    outlines: dict[str, dict[int, list[list[float]]]] = {}
    for row in table("VolumeTracings.csv", ("FileName", "X1", "Y1", "X2", "Y2", "Frame")):
        of_video = outlines.setdefault(row["FileName"].removesuffix(".avi"), {})
        of_video.setdefault(int(row["Frame"]), []).append([float(row[key]) for key in ("X1", "Y1", "X2", "Y2")])
    found = {}
    for row in table("FileList.csv", ("FileName", "Split")):
        name = row["FileName"].removesuffix(".avi")
        if row["Split"].upper() == part.upper() and len(outlines.get(name, {})) >= 2:
            file = root / "Videos" / f"{name}.avi"
            if not file.is_file():
                raise InputError(f"video {str(file)!r} not found; expected EchoNet-Dynamic as it is distributed")
            found[name] = reader(file, outlines[name])
    return found


LAYOUTS: dict[str, Callable[[Path, str], dict[str, Reader]]] = {
    "folders": _folders,
    "camus": _camus,
    "echonet": _echonet,
}


def find_masked_clips(data_root: str | Path, part: str, layout: str) -> dict[str, Reader]:
    """The clips of a part of a data set, by name; InputError if files are missing."""
    return in_layout(LAYOUTS, data_root, part, layout)


@mmengine.registry.DATASETS.register_module()
class MaskedClips(Dataset):
    """Clips with masks of all or some of their frames.

    An item is `inputs`, grey frames uint8 ``(T, 1, S, S)``, evenly spaced from the first to the last frame of the clip;
    `masks`, uint8 ``(T, S, S)``, 0, 1, and 255 for frames without a mask; and `spacing`, millimetres between rows and
    columns.

    Args:
        data_root: folder of the data set.
        part: "train" and so on; in CAMUS "training", "validation" and "testing".
        layout: "folders" for ``part/{frames,masks}/<clip>/<frame>.png``; "camus", "echonet" for these two as
            distributed.
        num_frames: T.
        size: S; None for the clips' own size.
        augment: flip, and turn by up to 10 degrees, at random, all frames alike.
        length: items per epoch, taken from the clips in turns; None for one per clip.
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.

    Raises:
        InputError: there is no such layout, files are missing or cannot be read.
    """

    def __init__(
        self,
        data_root: str,
        part: str,
        layout: str = "folders",
        num_frames: int = 10,
        size: int | None = 256,
        augment: bool = False,
        length: int | None = None,
        make: str | None = None,
    ):
        self.clips = list(find_masked_clips(data_root, part, layout).values())
        self.num_frames, self.size, self.augment = num_frames, size, augment
        self.length = length or len(self.clips)

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict:
        clip = self.clips[index % len(self.clips)]()
        places = np.linspace(0, len(clip.frames) - 1, self.num_frames).round().astype(int)
        height, width = clip.frames.shape[1:]
        unknown = np.full((height, width), UNKNOWN, np.uint8)
        frames = torch.from_numpy(clip.frames[places])[:, None]
        masks = torch.from_numpy(np.stack([clip.masks.get(int(i), unknown) for i in places]))[:, None]
        spacing = torch.tensor(clip.spacing)
        if self.size is not None:
            frames = transforms.resize(frames, [self.size, self.size], antialias=True)
            masks = transforms.resize(masks, [self.size, self.size], transforms.InterpolationMode.NEAREST_EXACT)
            spacing = spacing * torch.tensor([height / self.size, width / self.size])
        if self.augment:
            if torch.rand(()) < 0.5:
                frames, masks = frames.flip(-1), masks.flip(-1)
            angle = float(torch.empty(()).uniform_(-10, 10))
            frames = transforms.rotate(frames, angle, transforms.InterpolationMode.BILINEAR)
            known = (masks != UNKNOWN).flatten(1).all(1)
            turned = transforms.rotate(masks, angle)
            masks = torch.where(known[:, None, None, None], turned, masks)
        return {"inputs": frames.contiguous(), "masks": masks[:, 0].contiguous(), "spacing": spacing}

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if files are missing or the first clip cannot be read."""
        found = find_masked_clips(settings["data_root"], settings["part"], settings.get("layout", "folders"))
        next(iter(found.values()))()


@MODELS.register_module()
class ClipSegmenter(TimmModel):
    """A model to train that segments clips frame by frame, with cross-entropy and Dice of its logits on some frames.

    Both are computed at `num_points` points, drawn where the masks are uncertain, and summed over frames. The model's
    auxiliary logits have weight 0.01.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.GDKVM`; other arguments as in `TimmModel`.
        first_mask: give the model the mask of the first frame, which the authors' models never see.
        frames: which frames with masks count: "ends" for the first and the last, as in the authors' recipe, or "all".
        num_points: points at which masks are compared.
        auxiliary: weight of the auxiliary logits.

    Raises:
        InputError: unknown `frames`.
    """

    kinds, needs = ("tracking",), "run"
    inputs, read = ("clip", ENDINGS), staticmethod(lambda path: next(stream_frames(path)))

    def __init__(
        self,
        model_name: str,
        *args,
        first_mask: bool = False,
        frames: str = "ends",
        num_points: int = 12544,
        auxiliary: float = 0.01,
        **kwargs,
    ):
        if frames not in FRAMES:
            raise InputError(f"frames={frames!r}; expected one of {', '.join(FRAMES)}")
        super().__init__(model_name, *args, **kwargs)
        self.first_mask, self.frames, self.num_points, self.auxiliary = first_mask, frames, num_points, auxiliary

    def data_config(self, dataset: Any, pipeline: list[dict]) -> None:
        """None: timm has no settings for clips."""
        return

    def forward(self, inputs: list[Tensor], masks: Any = None, spacing: Any = None, mode: str = "tensor") -> Any:
        """Clips uint8 ``(T, C, H, W)``, and the masks and spacing of each, as in `MaskedClips`.

        Args:
            mode: "loss" for the losses, "predict" for a list of (found, masks, spacing) with `found` bool
                ``(T, H, W)``, "tensor" for logits ``(B, T, 1 + N, H, W)``.
        """
        clips = torch.stack(list(inputs)).float() / 255
        first = None
        if masks is not None and self.first_mask:
            first = torch.stack([mask[:1] == 1 for mask in masks]).to(clips)
        try:
            results, _ = self.model.run(clips, first)
        except ValueError as e:
            raise InputError(str(e)) from e
        if mode == "loss":
            return self.losses(results, torch.stack(list(masks)))
        logits = torch.stack([found["logits"] for found in results], 1)
        if mode == "tensor":
            return logits
        found = (logits[:, :, 1] > logits[:, :, 0]).cpu()
        return [(f, m.cpu(), s.cpu()) for f, m, s in zip(found, masks, spacing, strict=True)]

    def losses(self, results: list[dict[str, Tensor]], masks: Tensor) -> dict[str, Tensor]:
        """The losses of all frames that count; masks ``(B, T, H, W)``."""
        frames = range(len(results)) if self.frames == "all" else sorted({0, len(results) - 1})
        losses = {name: masks.new_zeros((), dtype=torch.float32) for name in ("loss_ce", "loss_dice", "loss_auxiliary")}
        for t in frames:
            known = (masks[:, t] != UNKNOWN).flatten(1).all(1)
            if not known.any():
                continue
            truth, found = (masks[known, t] == 1).float(), results[t]
            ce, dice = self.compare(found["logits"][known], truth)
            others = [found["sensory_logits"], *found["q_logits"].unbind(2)]
            extra = sum(sum(self.compare(logits[known], truth)) for logits in others)
            losses["loss_ce"] = losses["loss_ce"] + ce
            losses["loss_dice"] = losses["loss_dice"] + dice
            losses["loss_auxiliary"] = losses["loss_auxiliary"] + self.auxiliary * extra
        return losses

    def compare(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and Dice of logits ``(B, 2, h, w)`` of background and object, and masks ``(B, H, W)``."""
        margin = (logits[:, 1] - logits[:, 0]).float()
        at = uncertain_points(margin, self.num_points)
        values, wanted = sample(margin, at), sample(truth, at)
        return F.binary_cross_entropy_with_logits(values, wanted), dice_loss(values, wanted)

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the mask of the first frame."""
        parser.add_argument("--mask", help="mask image of the first frame: 0, and one value per object")

    @classmethod
    def find(cls, path: str | None) -> list[Path]:
        """The clip at `path`, or every clip below it."""
        return find_readable(path, cls.read)

    def predict_files(self, job: Job) -> list[dict]:
        """For each clip: its path, and a folder with a PNG mask of every frame, written as frames are read.

        Memory does not grow with the clip: frames come one by one, and only the model's state is kept.
        """
        given = job.options.mask
        if given and len(job.inputs) > 1:
            raise InputError(f"--mask {given!r} is of one clip; expected one, got {len(job.inputs)}")
        size, results = job.cfg.test_dataloader.dataset.get("size", 256), []
        for path, folder in zip(job.inputs, job.place("masks", ""), strict=True):
            count, state, labels = 0, None, [UNKNOWN]
            for frame in stream_frames(path):
                image = self.prepare(frame, size)
                mask = None
                if count == 0 and given:
                    labels, mask = self.first(given, frame.shape[:2], image.shape[-2:])
                logits, state = self.model(image, mask, state)
                found = F.interpolate(logits[0, 0][None], frame.shape[:2], mode="bilinear")[0].argmax(0).cpu().numpy()
                save_image(np.array([0, *labels], np.uint8)[found], folder / f"{count:06d}.png")
                count += 1
            results.append({"path": str(path), "folder": str(folder), "count": count})
        return results

    def prepare(self, frame: np.ndarray, size: int | None) -> Tensor:
        """A frame uint8 ``(H, W, 3)`` in the model's input format ``(1, 1, C, S, S)``."""
        pixels = torch.from_numpy(_grey(frame) if self.model.in_chans == 1 else frame.copy())
        image = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        sides = [size, size] if size else [side + -side % self.model.reduction for side in image.shape[1:]]
        image = transforms.resize(image, sides, antialias=True)
        return (image.float() / 255).to(next(self.parameters()).device)[None, None]

    def first(self, path: str, shape: Sequence[int], sides: Sequence[int]) -> tuple[list[int], Tensor]:
        """The values of the objects in a mask file, and their masks ``(1, N, *sides)``."""
        pixels = read_labels(path, "mask")
        if pixels.shape != tuple(shape):
            (h, w), (height, width) = pixels.shape, shape
            raise InputError(f"mask {path!r} is {w} x {h}; expected {width} x {height} as the first frame")
        labels = [int(value) for value in np.unique(pixels) if value]
        if not labels:
            raise InputError(f"mask {path!r} holds no object; expected pixels other than 0")
        masks = torch.stack([torch.from_numpy(pixels == label) for label in labels]).float()[None]
        return labels, F.interpolate(masks, list(sides), mode="area").to(next(self.parameters()).device)

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The first, the middle and the last frame with the outlines of their masks."""
        last, folder = result["count"] - 1, Path(result["folder"])
        places = sorted({0, last // 2, last})
        frames = [frame for t, frame in enumerate(stream_frames(result["path"])) if t in places]
        masks = [read_labels(folder / f"{t:06d}.png") > 0 for t in places]
        axis.imshow(np.vstack(frames))
        draw_outline(axis, np.vstack(masks), "C1")


@METRICS.register_module()
class ClipMetric(BaseMetric):
    """Dice and IoU in percent, HD95 and ASSD in millimetres, by MONAI: means over frames, then over clips.

    Distances leave out frames whose label or prediction has no object.

    Args:
        frames: which frames with masks count: "ends" for the first and the last, "all", or "later" for all except the
            first, whose mask the model was given.
    """

    default_prefix = "clip"

    def __init__(self, frames: str = "ends", **kwargs):
        super().__init__(**kwargs)
        if frames not in (*FRAMES, "later"):
            raise InputError(f"frames={frames!r}; expected one of {', '.join((*FRAMES, 'later'))}")
        self.frames = frames

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """The metrics of each clip."""
        for found, masks, spacing in data_samples:
            last = len(masks) - 1
            places = {"ends": sorted({0, last}), "all": range(last + 1), "later": range(1, last + 1)}[self.frames]
            frames = [t for t in places if (masks[t] != UNKNOWN).all()]
            measured = [self.measure(found[t], masks[t] == 1, spacing.tolist()) for t in frames]
            if measured:
                self.results.append({key: _mean(m[key] for m in measured) for key in measured[0]})

    @staticmethod
    def measure(found: Tensor, true: Tensor, spacing: list[float]) -> dict[str, float]:
        """The metrics of a frame: bool ``(H, W)``, and millimetres between rows and columns."""
        metrics = medical("monai.metrics")
        both = [torch.stack([~x, x])[None].float() for x in (found, true)]
        options = dict(include_background=False)
        values = {
            "Dice": 100 * metrics.compute_dice(*both, **options, ignore_empty=False),
            "IoU": 100 * metrics.compute_iou(*both, **options, ignore_empty=False),
        }
        if found.any() and true.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MONAI uses functions that it deprecates
                distance, surface = metrics.compute_hausdorff_distance, metrics.compute_average_surface_distance
                values["HD95"] = distance(*both, **options, percentile=95, spacing=spacing)
                values["ASSD"] = surface(*both, **options, symmetric=True, spacing=spacing)
        return {key: float(values[key]) if key in values else float("nan") for key in ("Dice", "IoU", "HD95", "ASSD")}

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means."""
        return {key: _mean(result[key] for result in results) for key in results[0]}


def _mean(values: Iterator[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")
