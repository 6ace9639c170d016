"""Restoration: pairs of degraded and clean images, a timm model that maps the ones to the others, its metrics."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmengine.registry
import numpy as np
import torch
from matplotlib.axes import Axes
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, MODELS
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .data import pair_files
from .errors import InputError
from .files import save_image
from .images import RANGES, image_size, read_pixels
from .task import Job, TimmModel


def read_image(path: str | Path, channels: int) -> Tensor:
    """An image file as float32 `(channels, H, W)`, integers of 8 or 16 bits scaled to [0, 1], floats as they are.

    Args:
        path: anything that Pillow reads; 16-bit files and float32 TIFFs have one channel.
        channels: 1 for grey, 3 for colour: grey files become colour and 8-bit colour files grey.

    Raises:
        InputError: the file is no image, or its kind or channels do not fit.
    """
    pixels = read_pixels(path)
    if pixels.ndim == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    image = torch.from_numpy(pixels.astype(np.float32) / RANGES.get(pixels.dtype, 1))
    image = image.permute(2, 0, 1) if image.dim() == 3 else image.expand(channels, -1, -1)
    return image.contiguous()


@mmengine.registry.DATASETS.register_module()
class PairedImages(Dataset):
    """Degraded images of `data_root/data_prefix/input` with clean ones of equal names in `target/`.

    An item is `inputs` and `targets`, float32 `(C, H, W)`, and `path`.

    Args:
        data_root, data_prefix: where the two folders are.
        channels: of the images that the model takes.
        crop: side of the random crops, flipped at random, of training; None for whole images.
        noise: standard deviation of Gaussian noise, with white at 1. If given, inputs are the clean images with noise
            that is drawn anew each time, and the input folder is not read.
        length: items of an epoch, taken from the images in turns; None for one of each image.
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.

    Raises:
        InputError: a folder is missing, an image is alone, cannot be read, is smaller than the crop, or two of a pair
            differ in size.
    """

    def __init__(
        self,
        data_root: str,
        data_prefix: str = "",
        channels: int = 1,
        crop: int | None = None,
        noise: float | None = None,
        length: int | None = None,
        make: str | None = None,
    ):
        self.pairs = pair_files(Path(data_root, data_prefix), ("input", "target"))
        self.channels, self.crop, self.noise = channels, crop, noise
        self.length = length or len(self.pairs)
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        self.augment = v2.Compose([v2.RandomCrop(crop), *flips]) if crop else torch.nn.Identity()

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict:
        degraded, clean = self.pairs[index % len(self.pairs)]
        images = [
            read_image(path, self.channels) for path in ([clean] if self.noise is not None else [degraded, clean])
        ]
        _check_sizes(degraded, clean, images[0].shape[1:], images[-1].shape[1:])
        height, width = images[0].shape[1:]
        if self.crop and min(height, width) < self.crop:
            size = f"{width} x {height}"
            raise InputError(f"image {str(clean)!r} is {size}; expected sides of {self.crop} at least, as the crop")
        images = self.augment(torch.stack(images))
        target = images[-1]
        inputs = images[0] if self.noise is None else target + self.noise * torch.randn_like(target)
        return {"inputs": inputs, "targets": target, "path": str(clean)}

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError where files are missing or alone, or the two of a pair differ in size."""
        root, noisy = Path(settings.get("data_root", ""), settings.get("data_prefix", "")), settings.get("noise")
        for degraded, clean in pair_files(root, ("input", "target")):
            if noisy is None:
                _check_sizes(degraded, clean, image_size(degraded), image_size(clean))


def _check_sizes(degraded: Path, clean: Path, size: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(size) != tuple(expected):
        found, said = (f"{w} x {h}" for h, w in (size, expected))
        raise InputError(f"image {str(degraded)!r} is {found}; expected {said} as its target {str(clean)!r}")


def charbonnier_loss(restored: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(difference^2 + eps^2): a smooth absolute error (Lai et al., LapSRN, 2017)."""
    return ((restored - target).square() + eps**2).sqrt().mean()


LOSSES = {"l1": F.l1_loss, "charbonnier": charbonnier_loss}


@MODELS.register_module()
class Restorer(TimmModel):
    """A restoration model to train.

    Args:
        model_name: timm name of a model that maps images (B, C, H, W) to restored ones; other arguments as in
            `TimmModel`.
        loss: "l1" or "charbonnier".

    Raises:
        InputError: there is no such loss.
    """

    kinds, read = ("restoration",), staticmethod(read_pixels)  # floats of any range

    def __init__(self, model_name: str, *args, loss: str = "l1", **kwargs):
        if loss not in LOSSES:
            raise InputError(f"loss={loss!r}; expected one of {', '.join(LOSSES)}")
        super().__init__(model_name, *args, **kwargs)
        self.loss = loss

    def forward(self, inputs: Tensor, targets: Any = None, path: Any = None, mode: str = "tensor") -> Any:
        """Images (B, C, H, W) to restored ones, to the loss, or to a list of pairs (restored, target) on the CPU."""
        restored = self.model(inputs)
        if mode == "tensor":
            return restored
        restored = restored.float()
        if mode == "loss":
            return {f"loss_{self.loss}": LOSSES[self.loss](restored, targets)}
        return list(zip(restored.cpu(), targets.cpu(), strict=True))

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """The tiles in which images are restored."""
        parser.add_argument("--tile", type=int, default=256, help="side of the tiles in which images are restored")
        parser.add_argument("--overlap", type=int, default=32, help="by how much those tiles overlap")

    def predict_files(self, job: Job) -> list[dict]:
        """Of each image its path and the restored one's: PNG files of as many bits, TIFF files for floats."""
        files = {kind: job.place("restored", kind) for kind in (".png", ".tiff")}
        device, results = next(self.parameters()).device, []
        for i, path in enumerate(job.inputs):
            image = read_image(path, self.model.in_chans).to(device)
            restored = restore_tiled(self.model, image, job.options.tile, job.options.overlap).cpu()
            dtype, pixels = read_pixels(path).dtype, restored.permute(1, 2, 0).squeeze(-1).numpy()
            if white := RANGES.get(dtype):
                pixels = (pixels.clip(0, 1) * white).round().astype(dtype)
            file = files[".png" if white else ".tiff"][i]
            save_image(pixels, file)
            results.append({"path": str(path), "restored": str(file)})
        return results

    @staticmethod
    def draw(axis: Axes, result: dict) -> None:
        """The image above the restored one."""
        parts = [read_pixels(result[key]) for key in ("path", "restored")]
        parts = [np.dstack([part] * 3) if part.ndim == 2 else part for part in parts]
        axis.imshow(np.vstack([(part / RANGES.get(part.dtype, 1)).clip(0, 1) for part in parts]))


@METRICS.register_module()
class RestorationMetric(BaseMetric):
    """PSNR in dB, SSIM, and RMSE of the restored images, clipped to [0, peak]; means over the images.

    Args:
        peak: white, from which PSNR and SSIM count.
        scale: what RMSE is multiplied by, to be in physical units.
    """

    default_prefix = "restore"

    def __init__(self, peak: float = 1.0, scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.peak, self.scale = peak, scale

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """The metrics of each image."""
        self.results += [self.measure(restored, target) for restored, target in data_samples]

    def measure(self, restored: Tensor, target: Tensor) -> dict[str, float]:
        """The metrics of an image (C, H, W)."""
        from torchmetrics.functional import image as metrics  # seconds, which other models need not wait

        restored, target = restored[None].clamp(0, self.peak), target[None]
        return {
            "PSNR": metrics.peak_signal_noise_ratio(restored, target, data_range=float(self.peak)).item(),
            "SSIM": metrics.structural_similarity_index_measure(restored, target, data_range=float(self.peak)).item(),
            "RMSE": F.mse_loss(restored, target).sqrt().item() * self.scale,
        }

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means."""
        return {name: float(np.mean([measured[name] for measured in results])) for name in results[0]}


def restore_tiled(model: Callable[[Tensor], Tensor], image: Tensor, tile: int = 256, overlap: int = 32) -> Tensor:
    """Restores an image in tiles that fade into each other, so that memory does not grow with the image.

    Args:
        model: maps (1, C, H, W) to the same shape.
        image: (C, H, W).
        tile: side of the tiles; a smaller image is one tile.
        overlap: by how much neighbours overlap at least.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"overlap={overlap}; expected 0 at least and less than tile={tile}")
    H, W = image.shape[1:]
    total, weights = torch.zeros_like(image), torch.zeros_like(image[:1])
    for top in _starts(H, tile, overlap):
        for left in _starts(W, tile, overlap):
            area = (slice(None), slice(top, top + tile), slice(left, left + tile))
            restored = model(image[area][None])[0].to(image.dtype)
            fade = [(torch.arange(n, device=image.device) + 1.0).clamp(max=overlap + 1) for n in restored.shape[1:]]
            rows, columns = (torch.minimum(f, f.flip(0)) for f in fade)
            weight = rows[:, None] * columns
            total[area] += restored * weight
            weights[area] += weight
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start that cover `length`; the last one ends with it."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]
