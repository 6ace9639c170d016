"""Image sets that timm's readers open: WebDataset shards, and data from Hugging Face, TensorFlow and torchvision."""

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmpretrain.registry import DATASETS, TRANSFORMS
from PIL import Image, ImageOps
from timm.data import create_dataset
from timm.data.dataset import ImageDataset

from .data import check_heads, first_line
from .errors import InputError
from .images import EXTENSIONS
from .layouts import Arranged

ENOUGH = 50  # images whose size is read
PARTS = {"train": ("train",), "val": ("validation", "valid", "val", "test")}
PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets"}
LOADERS = ("LoadImageFromFile", "LoadImage")  # steps that the reader has already done


def open_reader(name: str, data_root: str | None, split: str, **kwargs: Any) -> Any:
    """timm's data set; InputError if its package, its files or the split is missing."""
    prefix = name.partition("/")[0]
    try:
        return create_dataset(name, root=data_root, split=split, **kwargs)
    except Exception as e:  # a reader and its packages may raise anything
        package = PACKAGES.get(prefix)
        missing = isinstance(e, ImportError) or "Please install" in str(e)
        hint = f"expected the package {package!r} (pip install 'linzoo[shards]')" if missing else first_line(e)
        where = f" in {data_root!r}" if data_root else ""
        raise InputError(f"data set {name!r}{where}, split {split!r}: cannot be opened: {hint}") from e


class _Images:
    """Images from a reader, prepared by an mmpretrain pipeline without its loading step, which the reader does.

    Args:
        name: as in `timm.data.create_dataset`: ``wds/``, ``hfds/NAME-OR-FOLDER``, ``tfds/NAME``, ``torch/NAME``.
        split: the reader's name for it: ``train``; for WebDataset ``train-{0000..0127}.tar|160000``, or a name that
            ``_info.json`` beside the shards explains.
        data_root: folder of the shards, or where the reader stores downloads.
        pipeline: settings of transforms.
        classes: names; None for the reader's, if any.
        test_mode: every image once, in order.
        kwargs: for `timm.data.create_dataset`.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_root: str | None = None,
        pipeline: tuple[dict, ...] | list[dict] = (),
        classes: list[str] | None = None,
        test_mode: bool = False,
        **kwargs: Any,
    ):
        self.name, self.test_mode = name, test_mode
        self.inner = open_reader(name, data_root, split, is_training=not test_mode, **kwargs)
        self.metainfo = {"classes": tuple(found)} if (found := classes or names_of(self.inner)) else {}
        self.pipeline = Compose(
            [TRANSFORMS.build(step) for step in pipeline if step["type"].rpartition(".")[2] not in LOADERS]
        )

    def prepare(self, image: Image.Image, target: int) -> dict:
        """An image and its class after the pipeline."""
        pixels = np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[..., ::-1])
        size = pixels.shape[:2]
        prepared = self.pipeline(dict(img=pixels, img_shape=size, ori_shape=size, gt_label=int(target)))
        if prepared is None:
            raise InputError(f"data set {self.name!r}: the pipeline gives nothing for an image of {size}")
        return prepared

    @staticmethod
    def check(settings: dict, cfg: Config) -> list[str] | None:
        """The class names, if the reader has them; InputError if the model has another number of classes."""
        keys = ("name", "split", "data_root", "num_samples", "download")
        asked = {key: settings[key] for key in keys if settings.get(key)}
        if missing := {"name", "split"} - set(asked):
            raise InputError(f"config: a data set of timm's without {min(missing)!r}; expected name and split")
        asked.setdefault("data_root", None)
        found = settings.get("classes") or names_of(open_reader(**asked))
        if found:
            check_heads(cfg.model.get("head"), found, "model.head")
            count = cfg.model.get("num_classes", len(found))
            if count != len(found):
                raise InputError(f"config key model.num_classes={count}: {asked['name']!r} has {len(found)} classes")
        return list(found) or None


@DATASETS.register_module()
class TimmImages(_Images, torch.utils.data.Dataset):
    """Images by index (``hfds/``, ``torch/``), see `_Images`. One that cannot be read is an InputError."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.inner, torch.utils.data.Dataset) or not hasattr(self.inner, "__getitem__"):
            raise InputError(f"data set {self.name!r} cannot be read by number; expected type='TimmShards'")
        if isinstance(self.inner, ImageDataset):
            self.inner._max_retries = 1  # timm replaces an image that it cannot read by the next one

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict:
        try:
            image, target = self.inner[index]
        except (OSError, RuntimeError) as e:
            raise InputError(f"data set {self.name!r}: image {index} cannot be read ({first_line(e)})") from e
        return self.prepare(image, target)


@DATASETS.register_module()
class TimmShards(_Images, torch.utils.data.IterableDataset):
    """Images in a stream (``wds/``, ``tfds/``, ``hfids/``), see `_Images`; the order follows from seed and epoch.

    The runner passes `batch_size` and `num_workers`; the reader derives the length of an epoch from them.

    Raises:
        InputError: there are fewer shards than processes that read them; the number of images is not known.
    """

    def __init__(self, name: str, split: str, *args: Any, batch_size: int, num_workers: int, seed: int = 0, **kwargs):
        super().__init__(name, split, *args, batch_size=batch_size, seed=seed, **kwargs)
        self.seed, self.reader = seed, self.inner.reader
        self.inner.set_loader_cfg(num_workers=num_workers)
        info = getattr(self.reader, "split_info", None)
        shards, readers = len(getattr(info, "filenames", ())), getattr(self.reader, "global_num_workers", 1)
        if name.startswith("hfids/") and not self.reader.download:
            shards = self.reader.builder.as_streaming_dataset(split=split).num_shards
        if shards and shards < readers and not self.test_mode:
            raise InputError(
                f"data set {name!r}, split {split!r}: {shards} shards for {readers} readers; expected fewer workers"
            )
        if not len(self):
            raise InputError(f"data set {name!r}, split {split!r}: how many images? expected SHARDS|NUMBER")

    def __len__(self) -> int:
        return max(len(self.inner), self.test_mode and getattr(self.reader, "num_samples", 0))

    def __iter__(self) -> Iterator[dict]:
        for image, target in self.inner:
            yield self.prepare(image, target)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of an epoch, whatever was read before."""
        self.inner.set_epoch(epoch)
        if hasattr(self.reader, "ds"):  # WebDataset: its shuffling starts anew
            self.reader.ds, self.reader.worker_seed = None, self.seed + epoch


def names_of(data: Any) -> list[str]:
    """The class names that a reader knows, in the order of their numbers."""
    known = getattr(getattr(data, "reader", data), "class_to_idx", None) or {}
    return [str(name) for name, _ in sorted(known.items(), key=lambda item: item[1])]


def find_shards(folder: Path, part: str) -> list[Path]:
    """The shards of a part, such as ``train-0000.tar``, sorted."""
    return sorted(file for file in folder.glob("*.tar") if part in file.name)


def count_samples(shards: list[Path]) -> tuple[int, int]:
    """Numbers of images and classes in WebDataset shards; the latter is the largest number in .cls files, plus one.

    Raises:
        InputError: a shard is not a tar file, or a .cls file has no number.
    """
    images, classes = 0, 0
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    images += member.name.lower().endswith(EXTENSIONS)
                    if member.name.endswith(".cls"):
                        classes = max(classes, int(archive.extractfile(member).read()) + 1)  # type: ignore[union-attr]
        except (OSError, ValueError, tarfile.TarError) as e:
            raise InputError(f"shard {str(shard)!r}: {first_line(e)}; expected images and .cls files in a tar") from e
    return images, classes


def find_sets(data: str, names: list[str] | None, workers: int) -> tuple[Arranged, dict[str, dict[str, Any]]]:
    """The content of ``wds/FOLDER`` or ``hfds/NAME-OR-FOLDER``, and the settings of its parts `train` and `val`.

    Args:
        names: of the classes; without names, WebDataset classes are numbers.
        workers: number of reading processes.

    Raises:
        InputError: a part is missing, or cannot be read by so many.
    """
    prefix, _, place = data.partition("/")
    folder, counts, classes = Path(place), {}, list(names or ())
    if prefix == "wds":
        common = dict(type="TimmShards", name="wds/", data_root=str(folder.resolve()))
        shards = {
            part: next(filter(None, (find_shards(folder, kind) for kind in kinds)), []) for part, kinds in PARTS.items()
        }
        if not all(shards.values()):
            raise InputError(f"DATA {data!r}: expected shards named *train*.tar and *val*.tar in that folder")
        found = {part: count_samples(files) for part, files in shards.items()}
        counts = {part: images for part, (images, _) in found.items()}
        classes = classes or [str(i) for i in range(max(count for _, count in found.values()))]
        splits = {part: f"{'::'.join(f.name for f in files)}|{counts[part]}" for part, files in shards.items()}
    else:
        common = dict(type="TimmImages", name=f"hfds/{folder.resolve() if folder.exists() else place}")
        try:
            from datasets import get_dataset_split_names

            known = get_dataset_split_names(common["name"].partition("/")[2])
        except Exception as e:  # from the package, the Hub or the files
            raise InputError(f"DATA {data!r}: cannot be opened ({first_line(e)})") from e
        splits = {part: next((kind for kind in kinds if kind in known), "") for part, kinds in PARTS.items()}
        if not all(splits.values()):
            raise InputError(f"DATA {data!r} has the splits {', '.join(known)}; expected train, and validation or test")
    settings = {part: dict(common, split=split, test_mode=part == "val") for part, split in splits.items()}
    opened = {}
    for part, asked in settings.items():
        kwargs = {key: value for key, value in asked.items() if key != "type"}
        sizes = dict(batch_size=1, num_workers=workers) if prefix == "wds" else {}
        opened[part] = (TimmShards if prefix == "wds" else TimmImages)(**kwargs, **sizes)
        counts.setdefault(part, len(opened[part]))
    classes = classes or list(opened["train"].metainfo.get("classes", ()))
    if len(classes) < 2:
        raise InputError(f"DATA {data!r} has the classes {classes}; expected two at least")
    for asked in settings.values():
        asked["classes"] = classes
    sides = [min(image.size) for image, _ in itertools.islice(iter(opened["train"].inner), ENOUGH)]
    return Arranged("cls", classes, counts, int(median(sides)), min(sides)), settings
