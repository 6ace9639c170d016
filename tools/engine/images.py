"""Reads images and label maps in the same way everywhere: by Pillow, complete and upright."""

import os
from collections.abc import Callable
from pathlib import Path

import mmengine.registry
import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError, note

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pnm", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
)
ENDINGS = ", ".join(EXTENSIONS)
RANGES = {np.dtype("uint8"): 255, np.dtype("uint16"): 65535}  # values of white; floats are taken as they are
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap height and width


def is_hidden(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a file below a folder, or a folder in between, is hidden, such as `.ipynb_checkpoints`."""
    return any(part.startswith(".") for part in Path(path).relative_to(folder).parts)


def find_files(folder: str | os.PathLike, endings: tuple[str, ...] = EXTENSIONS, deep: bool = True) -> list[Path]:
    """The files below a folder with one of some endings, sorted. A note counts the others; hidden ones are ignored."""
    folder, found, others = Path(folder), [], []
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        if path.is_file() and not is_hidden(path, folder):
            (found if path.name.lower().endswith(endings) else others).append(path)
    if others and found:
        read = ", ".join(endings)
        note(f"{len(others)} files in {str(folder)!r} are left out, such as {others[0].name!r}; read are {read}")
    return found


def _opened(path: str | os.PathLike, what: str, use: Callable):
    """`use(image)` for an opened file; InputError if that fails, whatever error a damaged file raises."""
    try:
        with Image.open(path) as file:
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":  # phones add a preview after the photograph
                raise InputError(f"{what} {str(path)!r} holds {file.n_frames} images; expected one a file")
            return use(file)
    except InputError:
        raise
    except Exception as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"cannot read {what} {str(path)!r}; expected a whole image file ({reason})") from e


def image_size(path: str | os.PathLike, what: str = "image") -> tuple[int, int]:
    """Height and width of an upright image, without reading its pixels."""
    return _opened(path, what, lambda f: f.size if f.getexif().get(ORIENTATION) in TURNED else f.size[::-1])


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """An image upright, as stored: uint8 (H, W) or (H, W, 3), uint16 (H, W) or float32 (H, W).

    Palettes, CMYK and similar become RGB; transparency is dropped.

    Raises:
        InputError: the file is not an image, holds several, or has integers above 16 bits.
    """
    image = _opened(path, "image", ImageOps.exif_transpose)
    if image.mode not in ("L", "RGB", "F") and not image.mode.startswith("I"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    pixels = np.asarray(image)
    if pixels.dtype.kind in "iu" and pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 65535:
            raise InputError(f"image {str(path)!r} holds {pixels.dtype} values; expected 8 or 16 bits, or float32")
        pixels = pixels.astype(np.uint16)
    return pixels


def to_pixels(image: Tensor) -> np.ndarray:
    """An image ``(C, H, W)`` in [0, 1] as uint8 ``(H, W, 3)``, or ``(H, W)`` for one channel."""
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return pixels if pixels.shape[2] == 3 else pixels[..., 0]


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """An image upright, as uint8 RGB (H, W, 3): 16 bits are rounded to 8, floats from 0 to 1 scaled.

    Raises:
        InputError: as in `read_pixels`; floats lie outside [0, 1].
    """
    pixels = read_pixels(path)
    if pixels.dtype == np.float32:
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN, too
            span = f"{pixels.min():g} to {pixels.max():g}"
            raise InputError(f"image {str(path)!r} holds floats from {span}; expected 0 to 1, or integers")
        pixels = pixels * 255
    elif pixels.dtype == np.uint16:
        pixels = pixels / 257
    pixels = pixels.round().astype(np.uint8) if pixels.dtype != np.uint8 else pixels
    return np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels


def read_labels(path: str | os.PathLike, what: str = "label map") -> np.ndarray:
    """A map of indices, uint8 (H, W); for a palette image the indices, not the colours.

    Raises:
        InputError: the file is not an image, is in colour, or holds values above 255.
    """
    image = _opened(path, what, ImageOps.exif_transpose)
    labels = np.asarray(image)
    if labels.ndim == 3 and image.mode in ("LA", "RGB", "RGBA"):  # grey image saved as colour
        opaque = image.mode == "RGB" or labels[..., -1].min() == 255
        channels = labels[..., :3] if image.mode != "LA" else labels[..., :1]
        labels = channels[..., 0] if opaque and (channels == channels[..., :1]).all() else labels
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise InputError(f"{what} {str(path)!r} is in colour or floats ({image.mode}); expected one index a pixel")
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise InputError(f"{what} {str(path)!r} holds the value {labels.max()}; expected at most 255")
    return labels.astype(np.uint8)


@mmengine.registry.TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Loads the image at `img_path` by `read_rgb`, as uint8 BGR (H, W, 3). `load_config` replaces mmcv's loader by it.

    Args:
        to_float32: return float32 instead of uint8.

    Raises:
        InputError: the image cannot be read, or its size differs from its annotations'.
    """

    def __init__(self, to_float32: bool = False):
        self.to_float32 = to_float32

    def transform(self, results: dict) -> dict:
        """Adds `img`, `img_shape` and `ori_shape`."""
        image = np.ascontiguousarray(read_rgb(results["img_path"])[..., ::-1])
        size = image.shape[:2]
        check_size(results["img_path"], size, (results.get("height", size[0]), results.get("width", size[1])))
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = size
        return results


def check_size(path: str | os.PathLike, size: tuple[int, int], said: tuple[int, int]) -> None:
    """InputError if an image's height and width differ from its annotations'."""
    if tuple(size) != tuple(said):
        (h, w), (height, width) = size, said
        raise InputError(f"image {str(path)!r} is {w} x {h}; expected {width} x {height} as its annotations")
