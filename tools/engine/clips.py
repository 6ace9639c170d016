"""Classification of clips: folders of videos or of frames, and a clip model to train on them."""

import argparse
import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import mmengine.registry
import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .classifier import Classifier, find_classes
from .data import first_line
from .errors import InputError
from .images import find_files, is_hidden, read_rgb
from .task import Job

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
EXPECTED = f"expected video files ending in {', '.join(ENDINGS)}, or folders of frames"


def find_clips(folder: str | Path) -> list[Path]:
    """The clips below a folder, sorted: video files, and folders with images. Hidden ones are ignored."""
    folder = Path(folder)
    paths = [folder, *sorted(path for path in folder.rglob("*") if not is_hidden(path, folder))]
    return [p for p in paths if (bool(find_files(p, deep=False)) if p.is_dir() else p.name.lower().endswith(ENDINGS))]


def _find_classes(root: str | Path) -> dict[str, list[Path]]:
    return find_classes(root, lambda folder: [path for path in find_clips(folder) if path != folder], "clip", EXPECTED)


def _decoder(path: Path) -> tuple[int, Callable[[list[int]], np.ndarray]]:
    """The number of frames of a clip, and a function that reads some of them as uint8 RGB (T, H, W, 3)."""
    if path.is_dir():
        files = find_files(path, deep=False)
        return len(files), lambda index: np.stack([read_rgb(files[i]) for i in index])
    for name, read in (("torchcodec.decoders", _with_torchcodec), ("av", _with_pyav)):
        try:
            package = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):  # torchcodec looks for FFmpeg when it is imported
            continue
        return read(package, path)
    raise InputError(f"video {str(path)!r} needs a decoder: pip install av, or torchcodec; or give folders of frames")


def _with_torchcodec(package, path):
    decoder = package.VideoDecoder(str(path), dimension_order="NHWC")
    return len(decoder), lambda index: decoder.get_frames_at(index).data.numpy()


def _with_pyav(package, path):
    with package.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return len(frames), lambda index: np.stack([frames[i] for i in index])


def read_clip(path: str | Path, num_frames: int, anywhere: bool = False) -> Tensor:
    """Frames of a clip as uint8 (T, 3, H, W), one from each of its `num_frames` equal parts.

    Args:
        path: a video file, or a folder of frames in the order of their names.
        num_frames: number of frames.
        anywhere: take any frame of a part instead of its middle one.

    Raises:
        InputError: the clip cannot be read, has fewer frames, or frames of different sizes.
    """
    path = Path(path)
    try:
        count, read = _decoder(path)
        if count < num_frames:
            raise InputError(f"clip {str(path)!r} has {count} frames; expected at least num_frames={num_frames}")
        place = random.random if anywhere else (lambda: 0.5)
        frames = read([int((i + place()) * count / num_frames) for i in range(num_frames)])
    except InputError:
        raise
    except Exception as e:  # a damaged file may raise anything
        raise InputError(f"cannot read clip {str(path)!r}; {EXPECTED} of one size ({first_line(e)})") from e
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def stream_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a clip, one after the other, uint8 RGB (H, W, 3). Memory does not grow with its length.

    Args:
        path: a video file, or a folder of frames in the order of their names.

    Raises:
        InputError: the clip cannot be read, ends before its last frame, has no frames, or frames of different sizes;
            frames before the error were returned.
    """
    yield from (frame for frame, _ in stream_timed(path))


def stream_timed(path: str | Path) -> Iterator[tuple[np.ndarray, float]]:
    """As `stream_frames`, each frame with its time in seconds: from the video, or at 25 frames/s for a folder."""
    path, size, count = Path(path), None, 0
    for frame, time in _folder_frames(path) if path.is_dir() else _video_frames(path):
        if size and frame.shape != size:
            said = " x ".join(str(n) for n in frame.shape[1::-1])
            raise InputError(
                f"clip {str(path)!r}: frame {count} is {said}; expected {size[1]} x {size[0]} as the first"
            )
        size, count = frame.shape, count + 1
        yield frame, time
    if not count:
        raise InputError(f"clip {str(path)!r} holds no frame; {EXPECTED}")


def _folder_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    yield from ((read_rgb(file), i / 25) for i, file in enumerate(find_files(path, deep=False)))


def _video_frames(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    try:
        import av
    except ImportError as e:
        raise InputError(f"video {str(path)!r} needs a decoder: pip install av; or give folders of frames") from e
    count, promised = 0, 0
    try:
        with av.open(str(path)) as file:
            promised = file.streams.video[0].frames  # 0 if the file does not say
            for frame in file.decode(video=0):
                yield frame.to_ndarray(format="rgb24"), count / 25 if frame.time is None else frame.time
                count += 1
    except (av.FFmpegError, IndexError, ValueError) as e:
        where = f"frame {count} of video" if count else "video"
        raise InputError(f"cannot read {where} {str(path)!r}; {EXPECTED} ({first_line(e)})") from e
    if count < promised:
        raise InputError(f"video {str(path)!r} ends after {count} of {promised} frames; expected a whole file")


def find_readable(path: str | None, read: Callable[[Path], Any]) -> list[Path]:
    """The clip at `path`, or every clip below it, each tried once with `read`; InputError if there is none."""
    if path is None or not Path(path).exists():
        raise InputError(f"clip {path!r}: no such file or folder; {EXPECTED}")
    found = find_clips(path) if Path(path).is_dir() else [Path(path)]
    if not found:
        raise InputError(f"{path!r} holds no clip; {EXPECTED}")
    for clip in found:
        read(clip)
    return found


def test_transform(size: int) -> v2.Transform:
    """The centre of frames whose shorter side is `size`."""
    return v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])


@mmengine.registry.DATASETS.register_module()
class ClipFolder(Dataset):
    """Clips in one folder per class, as `inputs` uint8 (3, T, size, size).

    In training, all frames of a clip get the same crop, flip and RandAugment.

    Args:
        data_root: folder of the data set.
        data_prefix: folder in it that contains the class folders.
        num_frames: frames per clip, spread over all of it.
        size: side of the frames.
        test_mode: use middle frames and centre crops.
        augment: strength of RandAugment, 0 for none.
    """

    def __init__(
        self, data_root: str, data_prefix: str, num_frames: int, size: int, test_mode: bool = False, augment: int = 5
    ):
        found = _find_classes(Path(data_root, data_prefix))
        self.samples = [(path, i) for i, paths in enumerate(found.values()) for path in paths]
        self.metainfo = {"classes": tuple(found)}
        self.num_frames, self.test_mode = num_frames, test_mode
        crop = v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        strength = [v2.RandAugment(2, augment)] if augment else []
        train = v2.Compose([crop, v2.RandomHorizontalFlip(), *strength])
        self.transform = test_transform(size) if test_mode else train

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        path, label = self.samples[index]
        clip = self.transform(read_clip(path, self.num_frames, anywhere=not self.test_mode))
        return {"inputs": clip.transpose(0, 1).contiguous(), "data_samples": DataSample().set_gt_label(label)}

    @staticmethod
    def check(settings: dict, cfg: Config) -> list[str]:
        """The class names; InputError if folders are missing, or their number is not the model's."""
        folder = Path(settings.get("data_root", ""), settings.get("data_prefix", ""))
        found = list(_find_classes(folder))
        count = cfg.model.get("num_classes", len(found))
        if count != len(found):
            raise InputError(f"config key model.num_classes={count}: {str(folder)!r} has {len(found)} class folders")
        return found


@MODELS.register_module()
class ClipClassifier(Classifier):
    """A `Classifier` for clips.

    Args:
        model_name: timm name of a model that maps clips ``(B, 3, T, H, W)`` to logits; other arguments as in
            `Classifier`.
        mean, std: of pixel values from 0 to 255, by channel.
    """

    kinds, needs, example = ("video",), "reset_classifier", "videomamba_t_video"
    inputs: ClassVar[tuple[str, tuple[str, ...]]] = ("clip", ENDINGS)

    def __init__(
        self,
        model_name: str,
        *,
        mean: tuple[float, ...] = (123.675, 116.28, 103.53),
        std: tuple[float, ...] = (58.395, 57.12, 57.375),
        data_preprocessor: dict | None = None,
        **kwargs,
    ):
        super().__init__(
            model_name, data_preprocessor=data_preprocessor or {"type": "mmengine.BaseDataPreprocessor"}, **kwargs
        )
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1, 1), persistent=False)

    def forward(self, inputs: list[Tensor], data_samples: list[DataSample] | None = None, mode: str = "tensor") -> Any:
        """Clips, uint8 (3, T, H, W) each, to logits (B, K), to the losses ("loss"), or to samples with scores."""
        clips = (torch.stack(list(inputs)).float() - self.mean) / self.std
        return super().forward(clips, data_samples, mode)

    @classmethod
    def find(cls, path: str | None) -> list[Path]:
        """The clip at `path`, or every clip below it."""
        return find_readable(path, lambda clip: read_clip(clip, 1))

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds no options."""

    def predict_files(self, job: Job) -> list[dict]:
        """For each clip: path, label, confidence (softmax) and the five likeliest labels with their confidences."""
        settings = job.cfg.test_dataloader.dataset
        device, transform, results = next(self.parameters()).device, test_transform(settings.size), []
        for path in job.inputs:
            clip = transform(read_clip(path, settings.num_frames)).transpose(0, 1).to(device)
            scores, labels = self([clip], mode="predict")[0].pred_score.sort(descending=True)
            classes = job.classes or [str(i) for i in range(len(scores))]
            likeliest = zip(scores[:5].tolist(), labels[:5].tolist(), strict=True)
            top5 = [{"label": classes[label], "confidence": score} for score, label in likeliest]
            results.append(dict(path=str(path), **top5[0], top5=top5))
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The middle frame with label and confidence."""
        axis.imshow(read_clip(result["path"], 1)[0].permute(1, 2, 0))
        axis.set_title(f"{result['label']}  {result['confidence']:.0%}", fontsize=10)
