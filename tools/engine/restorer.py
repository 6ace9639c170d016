"""Restoration: pairs of degraded and clean images, a timm model that maps one to the other, and its metrics."""

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
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Image as ImageTensor

from .data import pair_files
from .errors import InputError
from .files import save_image
from .images import RANGES, image_size, read_pixels
from .task import Job, TimmModel

FOLDERS = ("input", "target")
LUMA = (65.481, 128.553, 24.966)  # of RGB in ITU-R BT.601, whose black is at 16 of 255


def read_image(path: str | Path, channels: int) -> Tensor:
    """An image file as float32 `(channels, H, W)`, integers of 8 or 16 bits scaled to [0, 1], floats unchanged.

    Args:
        path: anything that Pillow reads; 16-bit files and float32 TIFFs have one channel.
        channels: 1 for grey, 3 for colour. Grey files are converted to colour, and 8-bit colour files to grey.

    Raises:
        InputError: the file is not an image, or its type or channels do not fit.
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

    An item is `inputs` and `targets`, float32 `(C, H, W)`, and `path`. For super-resolution, targets are `scale` times
    as large. Targets that are slightly larger, as the original photographs may be, are cropped.

    Args:
        data_root, data_prefix: where the two folders are.
        channels: of the images that the model takes.
        crop: side of the random training crops of the inputs, flipped at random; None for whole images.
        noise: standard deviation of Gaussian noise, with white at 1. If given, inputs are the clean images with noise
            that is drawn anew each time, and the input folder is not read.
        jpeg: quality, 1 to 100, of JPEG compression. If given, inputs are the clean images compressed, and the input
            folder is not read.
        bicubic: inputs are the clean images, shrunk by `scale` in the usual way: bicubic with antialiasing (a = -1/2),
            rounded to eight bits. The input folder is not read.
        scale: size of targets over that of inputs.
        folders: names of the two folders, for DIV2K `("DIV2K_train_LR_bicubic/X2", "DIV2K_train_HR")`.
        suffix: an ending that only the stems of inputs have, such as "x2".
        rotate: also turn crops by 90 degrees at random.
        length: items per epoch, taken from the images in turns; None for one per image.
        make: name of a data set of `tools/make_data.py`, written to `data_root` if that is missing.

    Raises:
        InputError: a folder is missing; an image has no partner, cannot be read or is smaller than the crop; or the
            images of a pair differ in size.
    """

    def __init__(
        self,
        data_root: str,
        data_prefix: str = "",
        channels: int = 1,
        crop: int | None = None,
        noise: float | None = None,
        jpeg: int | None = None,
        bicubic: bool = False,
        scale: int = 1,
        folders: Sequence[str] = FOLDERS,
        suffix: str = "",
        rotate: bool = False,
        length: int | None = None,
        make: str | None = None,
    ):
        self.made, self.bicubic = noise is not None or jpeg is not None or bicubic, bicubic
        self.pairs = find_pairs(Path(data_root, data_prefix), folders, suffix, self.made)
        self.channels, self.crop, self.noise, self.jpeg = channels, crop, noise, jpeg
        self.scale, self.rotate = scale, rotate
        self.length = length or len(self.pairs)
        self.flips = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])

    def __len__(self):
        return self.length

    def __getitem__(self, index: int) -> dict:
        degraded, clean = self.pairs[index % len(self.pairs)]
        target = read_image(clean, self.channels)
        if self.bicubic:
            inputs = shrink(target, self.scale)
        else:
            inputs = target if self.made else read_image(degraded, self.channels)
        if not self.made:
            _check_sizes(degraded, clean, inputs.shape[1:], target.shape[1:], self.scale)
        height, width = inputs.shape[1:]
        target = target[:, : self.scale * height, : self.scale * width]
        if self.crop:
            if min(height, width) < self.crop:
                size = f"{width} x {height}"
                raise InputError(
                    f"image {str(degraded)!r} is {size}; expected sides of {self.crop} at least, as the crop"
                )
            inputs, target = self.augment(inputs, target, self.crop)
        if self.jpeg is not None:
            inputs = transforms.jpeg((target.clamp(0, 1) * 255).round().to(torch.uint8), self.jpeg).float() / 255
        if self.noise is not None:
            inputs = inputs + self.noise * torch.randn_like(inputs)
        return {"inputs": inputs, "targets": target, "path": str(clean)}

    def augment(self, inputs: Tensor, target: Tensor, crop: int) -> tuple[Tensor, Tensor]:
        """The same random crop of both, flipped and turned alike."""
        top, left = (int(torch.randint(side - crop + 1, ())) for side in inputs.shape[1:])
        turns = int(torch.randint(4, ())) if self.rotate else 0
        cut = []
        for image, factor in ((inputs, 1), (target, self.scale)):
            image = transforms.crop(image, *(factor * n for n in (top, left, crop, crop)))
            cut.append(ImageTensor(image.rot90(turns, (1, 2))))
        inputs, target = (image.as_subclass(Tensor) for image in self.flips(*cut))
        return inputs, target

    @staticmethod
    def check(settings: dict, cfg: Config) -> None:
        """InputError if files are missing or have no partner, or the images of a pair differ in size."""
        root = Path(settings.get("data_root", ""), settings.get("data_prefix", ""))
        made = settings.get("noise") is not None or settings.get("jpeg") is not None or settings.get("bicubic", False)
        for degraded, clean in find_pairs(root, settings.get("folders", FOLDERS), settings.get("suffix", ""), made):
            if not made:
                _check_sizes(degraded, clean, image_size(degraded), image_size(clean), settings.get("scale", 1))


def shrink(image: Tensor, scale: int) -> Tensor:
    """An image (C, H, W) at 1/scale of its size, rounded down: antialiased bicubic (a = -1/2) with eight bits."""
    H, W = (n // scale for n in image.shape[1:])
    small = F.interpolate(image[None, :, : scale * H, : scale * W], (H, W), mode="bicubic", antialias=True)[0]
    return (small.clamp(0, 1) * 255).round() / 255


def find_pairs(root: Path, folders: Sequence[str], suffix: str, made: bool) -> list[tuple[Path, Path]]:
    """Degraded and clean images below `root`. If the degraded ones are `made`, their folder may be missing; the clean
    images then come twice."""
    inputs, targets = folders
    if made and Path(root, targets).exists() and not Path(root, inputs).exists():
        return [(clean, clean) for _, clean in pair_files(root, (targets, targets))]
    return pair_files(root, (inputs, targets), suffix)


def _check_sizes(degraded: Path, clean: Path, size: Sequence[int], expected: Sequence[int], scale: int = 1) -> None:
    if scale > 1:
        fits = all(0 <= large - scale * small < scale for small, large in zip(size, expected, strict=True))
        if not fits:
            found, said = (f"{w} x {h}" for h, w in (size, expected))
            raise InputError(
                f"image {str(degraded)!r} is {found}; expected 1/{scale} of its target {str(clean)!r}, which is {said}"
            )
    elif tuple(size) != tuple(expected):
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
        gain: factor for images before the model, undone after it, for example for photographs and a model of
            satellite images, which are darker.

    Raises:
        InputError: there is no such loss; the gain is not positive.
    """

    kinds, read = ("restoration",), staticmethod(read_pixels)  # floats of any range

    def __init__(self, model_name: str, *args, loss: str = "l1", gain: float = 1.0, **kwargs):
        if loss not in LOSSES:
            raise InputError(f"loss={loss!r}; expected one of {', '.join(LOSSES)}")
        if not gain > 0:
            raise InputError(f"gain={gain}; expected a positive number")
        super().__init__(model_name, *args, **kwargs)
        self.loss, self.gain = loss, gain
        self.scale = getattr(self.model, "scale", 1)

    def restore(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to restored ones (B, C', scale H, scale W)."""
        return self.model(images) if self.gain == 1 else self.model(images * self.gain) / self.gain

    def forward(self, inputs: Tensor, targets: Any = None, path: Any = None, mode: str = "tensor") -> Any:
        """Images (B, C, H, W) to restored ones, to the loss, or to a list of pairs (restored, target) on the CPU."""
        restored = self.restore(inputs)
        if mode == "tensor":
            return restored
        restored = restored.float()
        if mode == "loss":
            return {f"loss_{self.loss}": LOSSES[self.loss](restored, targets)}
        return list(zip(restored.cpu(), targets.cpu(), strict=True))

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the tiles in which images are restored."""
        parser.add_argument("--tile", type=int, default=256, help="side of the tiles for restoration")
        parser.add_argument("--overlap", type=int, default=32, help="overlap of these tiles")

    def predict_files(self, job: Job) -> list[dict]:
        """For each image: its path and the restored one's, a PNG file with as many bits, or a TIFF file for floats."""
        if self.model.num_classes not in (1, 3):
            raise InputError(
                f"the model gives {self.model.num_classes} channels; expected 1 or 3, which image files hold"
            )
        files = {kind: job.place("restored", kind) for kind in (".png", ".tiff")}
        device, results = next(self.parameters()).device, []
        for i, path in enumerate(job.inputs):
            image = read_image(path, self.model.in_chans).to(device)
            restored = restore_tiled(self.restore, image, job.options.tile, job.options.overlap, self.scale).cpu()
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
        parts = [(part / RANGES.get(part.dtype, 1)).clip(0, 1) for part in parts]
        scale = parts[1].shape[0] // parts[0].shape[0]
        axis.imshow(np.vstack([parts[0].repeat(scale, 0).repeat(scale, 1), parts[1]]))


@METRICS.register_module()
class RestorationMetric(BaseMetric):
    """PSNR in dB, SSIM, and RMSE of the restored images, clipped to [0, peak]; means over the images.

    Args:
        peak: the value of white for PSNR and SSIM.
        scale: factor for RMSE, for physical units.
        levels: steps to which restored images are rounded, such as 255; None for none.
        luma: measure colour images by their luma Y (ITU-R BT.601), as is usual for super-resolution.
        border: pixels left out at each side; in super-resolution, as many as the scale.
        against_bicubic: also measure bicubic interpolation of the inputs, as `bicubic_PSNR` and so on.
    """

    default_prefix = "restore"

    def __init__(
        self,
        peak: float = 1.0,
        scale: float = 1.0,
        levels: int | None = None,
        luma: bool = False,
        border: int = 0,
        against_bicubic: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.peak, self.scale, self.levels, self.luma, self.border = peak, scale, levels, luma, border
        self.against_bicubic = against_bicubic

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """The metrics of each image."""
        measured = [self.measure(restored, target) for restored, target in data_samples]
        if self.against_bicubic:
            for found, image, (_, target) in zip(measured, data_batch["inputs"], data_samples, strict=True):
                large = F.interpolate(image[None].cpu(), target.shape[1:], mode="bicubic", antialias=True)[0]
                found.update({f"bicubic_{name}": value for name, value in self.measure(large, target).items()})
        self.results += measured

    def measure(self, restored: Tensor, target: Tensor) -> dict[str, float]:
        """The metrics of an image (C, H, W)."""
        from torchmetrics.functional import image as metrics  # takes seconds to import; other models need not wait

        restored, target = restored[None].clamp(0, self.peak), target[None]
        if self.levels:
            restored = (restored / self.peak * self.levels).round() * (self.peak / self.levels)
        if self.luma and target.shape[1] == 3:
            weights = target.new_tensor(LUMA).view(3, 1, 1) / 255
            restored, target = ((x * weights).sum(1, keepdim=True) + self.peak * 16 / 255 for x in (restored, target))
        if b := self.border:
            restored, target = restored[..., b:-b, b:-b], target[..., b:-b, b:-b]
        return {
            "PSNR": metrics.peak_signal_noise_ratio(restored, target, data_range=float(self.peak)).item(),
            "SSIM": metrics.structural_similarity_index_measure(restored, target, data_range=float(self.peak)).item(),
            "RMSE": F.mse_loss(restored, target).sqrt().item() * self.scale,
        }

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The means."""
        return {name: float(np.mean([measured[name] for measured in results])) for name in results[0]}


def restore_tiled(
    model: Callable[[Tensor], Tensor], image: Tensor, tile: int = 256, overlap: int = 32, scale: int = 1
) -> Tensor:
    """Restores an image in tiles that fade into each other, so that memory does not grow with the image.

    Args:
        model: maps (1, C, H, W) to (1, C', scale H, scale W).
        image: (C, H, W).
        tile: side of the tiles; a smaller image is one tile.
        overlap: least overlap of neighbours.
        scale: output size over input size.

    Returns:
        (C', scale H, scale W).
    """
    if not 0 <= overlap < tile:
        raise InputError(f"overlap={overlap}; expected 0 at least and less than tile={tile}")
    H, W = image.shape[1:]
    total, weights = image.new_zeros(1), image.new_zeros(1, scale * H, scale * W)
    for top in _starts(H, tile, overlap):
        for left in _starts(W, tile, overlap):
            restored = model(image[None, :, top : top + tile, left : left + tile])[0].to(image.dtype)
            if total.dim() == 1:
                total = image.new_zeros(len(restored), scale * H, scale * W)
            rows, columns = (slice(scale * start, scale * (start + tile)) for start in (top, left))
            ramp = scale * overlap + 1
            fade = [(torch.arange(n, device=image.device) + 1.0).clamp(max=ramp) for n in restored.shape[1:]]
            down, right = (torch.minimum(f, f.flip(0)) for f in fade)
            weight = down[:, None] * right
            total[:, rows, columns] += restored * weight
            weights[:, rows, columns] += weight
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Start positions of tiles that cover `length`; the last one ends with it."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]
