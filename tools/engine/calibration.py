"""Calibration images for quantisers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from .errors import InputError
from .images import find_files, read_rgb

Prepare = Callable[[list[Path]], list[Tensor]]
BATCH = 32


def prepared_by_timm(model: nn.Module, size: Sequence[int] | None = None) -> Prepare:
    """A function that makes batches ``(B, C, H, W)`` of files, prepared as in training, or at another size (H, W)."""
    settings = resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))
    if size:
        settings["input_size"] = (settings["input_size"][0], *size)
    transform = create_transform(**settings, is_training=False)

    def prepare(files: list[Path]) -> list[Tensor]:
        images = [torch.as_tensor(transform(Image.fromarray(read_rgb(file)))) for file in files]
        return [torch.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]

    return prepare


def calibration(folder: str, count: int, prepare: Prepare) -> list[Tensor]:
    """Batches of `count` images of a folder, evenly spaced in the order of their names."""
    if not Path(folder).is_dir():
        raise InputError(f"--calib {folder!r}: no such folder; expected one of images")
    found = find_files(folder)
    if len(found) < count:
        raise InputError(f"--calib {folder!r} holds {len(found)} images; expected {count}, or a smaller --images")
    chosen = [found[i * len(found) // count] for i in range(count)]
    batches = prepare(chosen)
    sizes = {tuple(batch.shape[2:]) for batch in batches}
    if len(sizes) > 1:
        (a, b), (c, d) = sorted(sizes)[:2]
        raise InputError(f"--calib {folder!r} holds images of {b} x {a} and {d} x {c}; expected one size")
    first = batches[0][0]
    if all(torch.equal(image, first) for batch in batches for image in batch):
        raise InputError(f"--calib {folder!r}: the {count} images are all alike; expected different ones")
    return batches
