"""Frame interpolation: triplets to train on, a model, metrics beside classical methods, videos of any length."""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import mmengine.registry
import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.registry import METRICS, MODELS
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .clips import ENDINGS, find_readable, stream_frames, stream_timed
from .data import existing_folder, in_layout
from .errors import InputError
from .files import save_image, whole, write_atomically
from .images import find_files, image_size, read_rgb, to_pixels
from .restorer import RestorationMetric, restore_tiled
from .task import Job, TimmModel

FACTORS = (2, 4, 8)
OVERLAP = 128  # of the tiles of large frames


def _vimeo(root: Path, part: str) -> list[list[Path]]:
    """Vimeo90K's triplets: ``sequences/<name>/im{1,2,3}.png``, named in ``tri_<part>list.txt``."""
    names = root / f"tri_{part}list.txt"
    if not names.is_file():
        raise InputError(f"list of triplets {str(names)!r} not found; expected Vimeo90K as it is distributed")
    found = [[root / "sequences" / name / f"im{i}.png" for i in (1, 2, 3)] for name in names.read_text().split()]
    for triplet in found:
        for file in triplet:
            if not file.is_file():
                raise InputError(f"frame {str(file)!r} not found; expected im1.png, im2.png and im3.png")
    return found


def _clips(root: Path, part: str) -> list[list[Path]]:
    """Folders of three or more frames, at any depth below ``<part>``, as in X-TRAIN."""
    folder = existing_folder(root / part, "expected folders of frames", root)
    leaves = [path for path in sorted([folder, *folder.rglob("*")]) if path.is_dir()]
    return [files for path in leaves if len(files := find_files(path, deep=False)) >= 3]


LAYOUTS: dict[str, Callable[[Path, str], list[list[Path]]]] = {"vimeo90k": _vimeo, "clips": _clips}


def find_triplets(data_root: str | Path, part: str, layout: str) -> list[list[Path]]:
    """The clips of a part of a data set, each with three or more frames; InputError if files are missing."""
    return in_layout(LAYOUTS, data_root, part, layout)


@mmengine.registry.DATASETS.register_module()
class Triplets(Dataset):
    """Three frames at equal distances: `inputs`, the outer two, uint8 ``(2, 3, H, W)``, and `targets` ``(3, H, W)``.

    Args:
        data_root: folder of the data set.
        part: "train" and so on.
        layout: "vimeo90k" as it is distributed; "clips" for folders of frames, such as X-TRAIN's.
        gap: distance between neighbours of a triplet, in frames: one number, or two to draw it from.
        crop: side of the random training crops, turned, mirrored and reversed in time at random; None for whole frames.
        length: items per epoch, taken from the clips in turns; None for one item per clip.
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.

    Raises:
        InputError: there is no such layout; files are missing, cannot be read or differ in size.
    """

    def __init__(
        self,
        data_root: str,
        part: str,
        layout: str = "vimeo90k",
        gap: int | Sequence[int] = 1,
        crop: int | None = None,
        length: int | None = None,
        make: str | None = None,
    ):
        self.clips = find_triplets(data_root, part, layout)
        self.gap = (gap, gap) if isinstance(gap, int) else tuple(gap)
        self.crop, self.length = crop, length or len(self.clips)
        if not 1 <= self.gap[0] <= self.gap[1]:
            raise InputError(f"gap={gap!r}; expected a positive number, or a smaller and a larger one")

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict:
        files = self.clips[index % len(self.clips)]
        most = min(self.gap[1], (len(files) - 1) // 2)
        gap = int(torch.randint(min(self.gap[0], most), most + 1, ()))
        room = len(files) - 2 * gap
        start = int(torch.randint(room, ())) if self.crop else room // 2
        chosen = files[start : start + 2 * gap + 1 : gap]
        frames = [read_rgb(file) for file in chosen]
        for file, frame in zip(chosen, frames, strict=True):
            if frame.shape != frames[0].shape:
                (h, w), (height, width) = frame.shape[:2], frames[0].shape[:2]
                raise InputError(f"frame {str(file)!r} is {w} x {h}; expected {width} x {height} as the first")
        clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        if self.crop:
            clip = self.augment(clip, self.crop, chosen[0])
        return {"inputs": clip[0::2].contiguous(), "targets": clip[1].contiguous(), "path": str(chosen[1])}

    @staticmethod
    def augment(clip: Tensor, crop: int, path: Path) -> Tensor:
        """The same random crop of all frames; turned, mirrored and reversed in time at random."""
        H, W = clip.shape[2:]
        if min(H, W) < crop:
            raise InputError(f"frame {str(path)!r} is {W} x {H}; expected sides of {crop} at least, as the crop")
        top, left = (int(torch.randint(side - crop + 1, ())) for side in (H, W))
        clip = clip[:, :, top : top + crop, left : left + crop]
        for axis in (0, 2, 3):
            clip = clip.flip(axis) if torch.rand(()) < 0.5 else clip
        return clip.transpose(2, 3) if torch.rand(()) < 0.5 else clip

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if files are missing or a triplet's first frames differ in size."""
        found = find_triplets(settings["data_root"], settings["part"], settings.get("layout", "vimeo90k"))
        if len({image_size(file, "frame") for file in found[0]}) > 1:
            raise InputError(f"frames of {str(found[0][0].parent)!r} differ in size; expected equal ones")


def _blur(x: Tensor, gain: float = 1.0) -> Tensor:
    """The binomial filter of five taps along both axes."""
    taps = x.new_tensor([1.0, 4, 6, 4, 1]) / 16 * gain**0.5
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def laplacian_loss(found: Tensor, wanted: Tensor, levels: int = 5) -> Tensor:
    """Sum over the levels of the mean absolute difference of two images' Laplacian pyramids (Burt and Adelson, 1983).

    Args:
        found, wanted: ``(B, C, H, W)``; sides halve from level to level, rounded up, and stay 3 at least.
    """
    total, rest = found.new_zeros(()), found - wanted  # the pyramid is linear
    for _ in range(levels - 1):
        if min(rest.shape[2:]) < 6:
            break
        small = _blur(rest)[:, :, ::2, ::2]
        large = torch.zeros_like(rest)
        large[:, :, ::2, ::2] = small
        total = total + (rest - _blur(large, 4.0)).abs().mean()
        rest = small
    return total + rest.abs().mean()


@MODELS.register_module()
class Interpolator(TimmModel):
    """A model that predicts the frame between two, trained with the Laplacian pyramids of its frame and its blends.

    Args:
        model_name: timm name of a model such as `linzoo.backbones.VFIMamba`; other arguments as in `TimmModel`.
        bgr: the model takes channels as blue, green, red, as the authors' weights do.
        blends: total weight of the losses of the intermediate blends.
        scale: in prediction, the size of the frames for features and flow, relative to the full size.
    """

    kinds = ("interpolation",)
    inputs, read = ("clip", ENDINGS), staticmethod(lambda path: next(stream_frames(path)))

    def __init__(self, model_name: str, *args, bgr: bool = False, blends: float = 0.5, scale: float = 1.0, **kwargs):
        if not 0 < scale <= 1:
            raise InputError(f"scale={scale}; expected a share of 1")
        super().__init__(model_name, *args, **kwargs)
        self.bgr, self.blends, self.scale = bgr, blends, scale

    def data_config(self, dataset: Any, pipeline: list[dict]) -> None:
        """None: timm has no settings for pairs of frames."""
        return

    def forward(self, inputs: Any, targets: Any = None, path: Any = None, mode: str = "tensor") -> Any:
        """Pairs uint8 ``(2, 3, H, W)`` and the frames between ``(3, H, W)``, as in `Triplets`.

        Args:
            mode: "loss" for the losses, "predict" for a list of pairs (found, target) on the CPU, "tensor" for frames
                ``(B, 3, H, W)`` in [0, 1].
        """
        if mode == "predict":
            pairs = [self.between(pair[:1].float() / 255, pair[1:].float() / 255)[0].cpu() for pair in inputs]
            return [(found, target.cpu().float() / 255) for found, target in zip(pairs, targets, strict=True)]
        first, second = (torch.stack(list(inputs)).float() / 255).unbind(1)
        if mode == "tensor":
            return self.between(first, second)
        wanted = torch.stack(list(targets)).float() / 255
        order = [2, 1, 0] if self.bgr else [0, 1, 2]
        first, second, wanted = (x[:, order] for x in (first, second, wanted))
        try:
            found = self.model.run(first, second)
        except ValueError as e:
            raise InputError(str(e)) from e
        blends = [self.model.blend(first, second, motion) for motion in found["motions"]]
        losses = [laplacian_loss(blend, wanted) for blend in blends]
        return {
            "loss_frame": laplacian_loss(found["merged"] + 2 * found["residual"] - 1, wanted),
            "loss_blends": self.blends * torch.stack(losses).mean(),
        }

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """The middle frame of two ``(B, 3, H, W)``, in red, green, blue from 0 to 1."""
        order = [2, 1, 0] if self.bgr else [0, 1, 2]
        return self.model(first[:, order], second[:, order], scale=self.scale)[:, order]

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the number of frames, and the tiles of large ones."""
        parser.add_argument("--factor", type=int, default=2, help="2, 4 or 8 times as many frames")
        parser.add_argument("--gif", action="store_true", help="also write an animated GIF of each clip")
        parser.add_argument("--frame-tile", type=int, default=1280, help="side of the tiles of large frames")

    @classmethod
    def find(cls, path: str | None) -> list[Path]:
        """The clip at `path`, or every clip below it."""
        return find_readable(path, cls.read)

    def predict_files(self, job: Job) -> list[dict]:
        """For each clip: its path and that of the result, a folder of PNG files for a folder of frames, a video for a
        video. Results are written as frames are read. If the clip ends too early, the result is complete up to there.

        Memory does not grow with the clip. Intervals between two frames are halved, so that each new frame is the
        model's middle frame.
        """
        factor, results = job.options.factor, []
        if factor not in FACTORS:
            raise InputError(f"--factor {factor}; expected one of {', '.join(map(str, FACTORS))}")
        if job.options.frame_tile <= OVERLAP:
            raise InputError(f"--frame-tile {job.options.frame_tile}; expected more than {OVERLAP}")
        places = job.place("clips", "")
        for path, place in zip(job.inputs, places, strict=True):
            made = self.stream(path, factor, job.options.frame_tile)
            if path.is_dir():
                count = 0
                for count, (frame, _) in enumerate(made, 1):  # noqa: B007
                    save_image(frame, place / f"{count - 1:06d}.png")
                results.append({"path": str(path), "folder": str(place), "count": count})
            else:
                file = place.with_name(f"{place.name}.mp4")
                results.append({"path": str(path), "video": str(file), "count": write_video(made, file)})
            if job.options.gif:
                source, gif = results[-1].get("video") or place, place.with_name(f"{place.name}.gif")
                write_gif(stream_timed(Path(source)), gif)
                results[-1]["gif"] = str(gif)
        return results

    def stream(self, path: Path, factor: int, tile: int) -> Iterator[tuple[np.ndarray, float]]:
        """The frames of a clip and those between them, uint8 ``(H, W, 3)``, each with its time in seconds."""
        device, before = next(self.parameters()).device, None
        with Progress(transient=True) as progress:
            task = progress.add_task(path.name, total=None)
            for frame, time in stream_timed(path):
                after = (torch.from_numpy(frame.copy()).permute(2, 0, 1).float() / 255).to(device)
                if before is not None:
                    image, then = before
                    found = self.halve(image, after, int(math.log2(factor)), tile)
                    for i, middle in enumerate(found, 1):
                        yield to_pixels(middle), then + (time - then) * i / factor
                yield frame, time
                before = after, time
                progress.advance(task)

    def halve(self, first: Tensor, second: Tensor, depth: int, tile: int) -> list[Tensor]:
        """The ``2^depth - 1`` frames between two ``(3, H, W)``, in tiles."""

        def model(pair: Tensor) -> Tensor:
            return self.between(pair[:, :3], pair[:, 3:])

        middle = restore_tiled(model, torch.cat([first, second]), tile, OVERLAP)
        if depth == 1:
            return [middle]
        halves = ((first, middle), (middle, second))
        left, right = (self.halve(a, b, depth - 1, tile) for a, b in halves)
        return [*left, middle, *right]

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The first three frames."""
        source = result.get("video") or result["folder"]
        frames = [frame for frame, _ in zip(stream_frames(source), range(3), strict=False)]
        axis.imshow(np.vstack(frames))


def write_gif(frames: Iterator[tuple[np.ndarray, float]], file: Path) -> None:
    """Writes frames with their times as an animated GIF that repeats; each is shown as long as the first one."""
    head = list(itertools.islice(frames, 2))
    duration = 1000 * (head[-1][1] - head[0][1])
    first, *others = (Image.fromarray(pixels) for pixels, _ in head)
    rest = itertools.chain(others, (Image.fromarray(pixels) for pixels, _ in frames))
    options = dict(save_all=True, append_images=rest, duration=max(duration, 20), loop=0)
    write_atomically(file, lambda partial: first.save(partial, format="gif", **options))


def write_video(frames: Iterator[tuple[np.ndarray, float]], file: Path) -> int:
    """Writes frames with their times as an H.264 video (MPEG-4 without such an encoder); returns their number.

    An error from `frames` is raised again once the file is complete up to there.
    """
    import av

    count, failed = 0, None
    file.parent.mkdir(parents=True, exist_ok=True)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    unit = Fraction(1, 60000)
    with whole(file) as partial:
        with av.open(str(partial), "w", format="mp4") as output:
            stream = None
            try:
                for pixels, time in frames:
                    if stream is None:
                        stream = output.add_stream(codec, rate=60, options={"crf": "12"} if codec == "libx264" else {})
                        stream.height, stream.width = (side + side % 2 for side in pixels.shape[:2])
                        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", unit
                        if codec != "libx264":
                            stream.bit_rate = 20_000_000
                    (h, w), even = pixels.shape[:2], (stream.height, stream.width)
                    pixels = np.pad(pixels, ((0, even[0] - h), (0, even[1] - w), (0, 0)), mode="edge")
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts, frame.time_base = round(time / unit), unit
                    output.mux(stream.encode(frame))
                    count += 1
            except InputError as e:
                failed = e
            if stream is not None:
                output.mux(stream.encode())
        if count:
            partial.replace(file)
        else:
            partial.unlink(missing_ok=True)
    if failed is not None:
        raise failed
    return count


@METRICS.register_module()
class InterpolationMetric(RestorationMetric):
    """PSNR and SSIM of the frames, and of two simple alternatives: `average_PSNR` for the mean of both frames, and
    `flow_PSNR` for both frames warped along a classical optical flow (scikit-image's `optical_flow_ilk`) and averaged.

    Args:
        against: also measure these two.
        kwargs: as in `RestorationMetric`.
    """

    default_prefix = "frame"

    def __init__(self, against: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.against = against

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """The metrics of each frame."""
        for pair, (found, target) in zip(data_batch["inputs"], data_samples, strict=True):
            measured = self.measure(found, target)
            if self.against:
                first, second = pair.float().cpu() / 255
                others = {"average": (first + second) / 2, "flow": flow_between(first, second)}
                for name, image in others.items():
                    measured[f"{name}_PSNR"] = self.measure(image, target)["PSNR"]
            self.results.append(measured)


def flow_between(first: Tensor, second: Tensor) -> Tensor:
    """The middle of two frames ``(3, H, W)`` by scikit-image's iterative Lucas-Kanade flow, half of it each way."""
    from skimage.registration import optical_flow_ilk
    from skimage.transform import warp

    images = [x.permute(1, 2, 0).double().numpy() for x in (first, second)]
    grey = [image @ (0.299, 0.587, 0.114) for image in images]
    flow = optical_flow_ilk(*grey, radius=7)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in grey[0].shape), indexing="ij")).astype(float)
    half = [
        np.stack([warp(image[..., c], grid + way * flow / 2, order=1, mode="edge") for c in range(3)])
        for image, way in zip(images, (-1, 1), strict=True)
    ]
    return torch.from_numpy((half[0] + half[1]) / 2).float()
