"""Image folders, checked: `root/<class>/<image>`."""

import os
from pathlib import Path

from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS

from ..make_data import MAKERS
from .errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def check_image_folder(root: str | os.PathLike) -> list[str]:
    """The class folders of `root`, sorted. InputError where the folder is missing or a class has no image in it."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(
            f"data folder {str(root)!r} not found (looked in {str(root.absolute())!r}); "
            f"expected one folder of images per class; {_remedy(root)}"
        )
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not found:
        raise InputError(f"data folder {str(root)!r} holds no class folder; expected one folder of images per class")
    for name in found:
        if not any(file.lower().endswith(EXTENSIONS) for _, _, files in os.walk(root / name) for file in files):
            raise InputError(
                f"class folder {str(root / name)!r} holds no image; expected files ending in {', '.join(EXTENSIONS)}"
            )
    return found


def _remedy(root: Path) -> str:
    name = root.parent.name
    if name in MAKERS:
        return f"prepare it with: python tools/make_data.py {name} --out {root.parent}"
    return "put the images there, or point the config's data_root at them"


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """mmpretrain's folder-per-class dataset that refuses empty classes and names an image it cannot read.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.
    """

    def __init__(self, make: str | None = None, extensions=EXTENSIONS, **kwargs):
        super().__init__(extensions=extensions, **kwargs)

    def _find_samples(self):
        check_image_folder(self.img_prefix)
        return super()._find_samples()

    def prepare_data(self, idx):
        try:
            return super().prepare_data(idx)
        except (AssertionError, OSError, ValueError) as e:
            path = self.get_data_info(idx)["img_path"]
            raise InputError(f"cannot read image {path!r}; expected a whole image file ({_first_line(e)})") from e


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def prepare_data(cfg) -> None:
    """Make the data sets that the config says how to make, then check every image folder that it names.

    Raises InputError before anything of a run is written.
    """
    classes = None
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = (cfg.get(key) or {}).get("dataset", {})
        if dataset.get("type") != "ImageFolder" or dataset.get("ann_file"):
            continue
        root = Path(dataset.get("data_root", ""))
        if dataset.get("make") and not root.exists():
            MAKERS[dataset["make"]](root)
        folder = root / dataset.get("data_prefix", "")
        found = check_image_folder(folder)
        if classes is not None and found != classes:
            odd = ", ".join(sorted(set(found) ^ set(classes))[:4])
            raise InputError(f"data folder {str(folder)!r} has other classes than the training folder: {odd}")
        classes = found
        count = cfg.model.get("num_classes", len(found))
        if count != len(found):
            raise InputError(f"config key model.num_classes={count}: {str(folder)!r} has {len(found)} class folders")
