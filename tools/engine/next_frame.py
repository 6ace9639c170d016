"""Video: clips in one file, a next-frame model to train, and how much better it is than copying a frame."""

import argparse
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

from ..make_data import MAKERS
from .data import first_line
from .errors import InputError
from .files import write_atomically
from .task import Job, TimmModel


def read_clips(path: str | Path) -> np.ndarray:
    """The clips in a file, uint8 ``(clips, frames, height, width)``; InputError if it holds none."""
    try:
        clips = np.load(path, mmap_mode="r")
    except (EOFError, OSError, ValueError) as e:
        raise InputError(f"cannot read clips {str(path)!r}; expected a whole .npy file ({first_line(e)})") from e
    if clips.ndim != 4 or clips.dtype != np.uint8:
        raise InputError(f"clips {str(path)!r} are {clips.dtype} {clips.shape}; expected uint8 of four axes")
    return clips


@mmengine.registry.DATASETS.register_module()
class Clips(Dataset):
    """The clips of a file ``data_root/part.npy``, uint8 ``(clips, frames, height, width)``, as `inputs` (T, 1, H, W).

    Args:
        data_root: folder of the files.
        part: name of the file, without its ending.
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.
    """

    def __init__(self, data_root: str, part: str, make: str | None = None):
        if make and not Path(data_root).exists():
            MAKERS[make](data_root)
        self.clips = read_clips(self.file(data_root, part))

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": torch.from_numpy(self.clips[index].copy()).unsqueeze(1)}

    @staticmethod
    def file(data_root: str, part: str) -> Path:
        """The path of a file; InputError if it is missing."""
        path = Path(data_root, f"{part}.npy")
        if not path.is_file():
            raise InputError(f"clips {str(path)!r} not found; expected uint8 frames (clips, frames, height, width)")
        return path

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if the file is missing or holds no clips."""
        read_clips(Clips.file(settings["data_root"], settings["part"]))


@MODELS.register_module()
class NextFrame(TimmModel):
    """A next-frame model, trained with half the squared and half the absolute error.

    It sees all frames of a clip except the last and predicts the frame after each.

    Args:
        model_name: timm name of a model that maps clips ``(B, T, C, H, W)`` in [-1, 1] to those one frame later, and
            to its states; further arguments as in `TimmModel`.
        context: Frames to see before errors count in "predict", because one frame does not show where things move.
    """

    kinds, needs = ("video",), "generate"
    inputs, read = ("file of clips", (".npy",)), staticmethod(read_clips)

    def __init__(self, model_name: str, *args, context: int = 5, **kwargs):
        super().__init__(model_name, *args, **kwargs)
        self.context = context

    def forward(self, inputs: list[Tensor], data_samples: Any = None, mode: str = "tensor") -> Any:
        """Clips, uint8 ``(T, C, H, W)`` each, to predictions, losses or errors.

        Args:
            inputs: clips of one size.
            data_samples: ignored.
            mode: "tensor" for the frames after each except the last ``(B, T - 1, C, H, W)`` in [-1, 1]; "loss"; or
                "predict" for mean squared errors of each clip, with values in [0, 1], after the context: "one_step" for
                frames predicted from all before, "rollout" for all frames predicted from only the context, and
                "copy_one_step" and "copy_rollout" for repeating the last frame seen.
        """
        clips = torch.stack(list(inputs)).float() / 127.5 - 1
        seen, following = clips[:, :-1], clips[:, 1:]
        if mode == "predict":
            given, rest = clips[:, : self.context], clips[:, self.context :]
            guesses = {
                "one_step": self.model(seen)[0][:, self.context - 1 :],
                "rollout": self.model.generate(given, rest.shape[1]),
                "copy_one_step": seen[:, self.context - 1 :],
                "copy_rollout": given[:, -1:].expand_as(rest),
            }
            errors = {name: ((guess - rest) / 2).square().flatten(1).mean(1) for name, guess in guesses.items()}
            return [{name: error[i].item() for name, error in errors.items()} for i in range(len(clips))]
        predicted = self.model(seen)[0]
        if mode == "tensor":
            return predicted
        predicted = predicted.float()
        return {"loss_l2": F.mse_loss(predicted, following) / 2, "loss_l1": F.l1_loss(predicted, following) / 2}

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the number of frames to predict."""
        parser.add_argument("--frames", type=int, default=10, help="number of frames to append to each clip")

    def predict_files(self, job: Job) -> list[dict]:
        """For each file of clips: its path and that of the predicted frames, uint8 ``(clips, frames, H, W)``."""
        device, results = next(self.parameters()).device, []
        for path, file in zip(job.inputs, job.place("frames", ".npy"), strict=True):
            made = []
            for clip in read_clips(path):
                seen = torch.from_numpy(clip.copy()).to(device)[None, :, None].float() / 127.5 - 1
                try:
                    frames = self.model.generate(seen, job.options.frames)[0, :, 0]
                except ValueError as e:
                    raise InputError(f"clips {str(path)!r}: {e}") from e
                made.append(((frames + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())
            write_atomically(file, lambda partial, made=made: _save(np.stack(made), partial))
            results.append({"path": str(path), "frames": str(file)})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The last frame of the first clip above the predicted ones."""
        frames = [np.load(result["path"], mmap_mode="r")[0, -1], *np.load(result["frames"])[0]]
        axis.imshow(np.vstack(frames), cmap="gray", vmin=0, vmax=255)


def _save(clips: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # given a path, NumPy adds its ending
        np.save(file, clips)


@METRICS.register_module()
class NextFrameMetric(BaseMetric):
    """Mean squared errors over all clips, and by how many percent the model's are below those of copying a frame."""

    default_prefix = "frame"

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Collects the errors of each clip."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means, and `below_copy` and `rollout_below_copy` in percent."""
        means = {name: float(np.mean([errors[name] for errors in results])) for name in results[0]}
        means["below_copy"] = 100 * (1 - means["one_step"] / means["copy_one_step"])
        means["rollout_below_copy"] = 100 * (1 - means["rollout"] / means["copy_rollout"])
        return means
