"""Data, checked: `root/<class>/<image>`, `root/images/<image>` with `root/masks/<image>`, or clips in one file."""

import os
from pathlib import Path

import mmengine.registry
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS
from mmseg.datasets import BaseSegDataset
from PIL import Image
from torch.utils.data import Dataset

from ..make_data import MAKERS
from .errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_ENDINGS = ", ".join(EXTENSIONS)
PAIRED = {"MaskedImages": ("images", "masks"), "PairedImages": ("input", "target")}  # the folders of data sets of pairs


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
            raise InputError(f"class folder {str(root / name)!r} holds no image; expected files ending in {_ENDINGS}")
    return found


def pair_files(root: str | os.PathLike, parts: tuple[str, str] = ("images", "masks")) -> list[tuple[Path, Path]]:
    """Images of `root/images` with the masks of equal stem in `root/masks`, or of two other folders, sorted.

    InputError where a folder is missing or empty, a file is alone, or two have one stem.
    """
    root, found = Path(root), []
    for part in parts:
        folder = root / part
        if not folder.is_dir():
            raise InputError(
                f"data folder {str(folder)!r} not found (looked in {str(folder.absolute())!r}); "
                f"expected {parts[0]}/ and {parts[1]}/ with files of equal names in {str(root)!r}; {_remedy(root)}"
            )
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS)
        if not files:
            raise InputError(f"data folder {str(folder)!r} holds no image; expected files ending in {_ENDINGS}")
        stems = {file.stem: file for file in files}
        if len(stems) < len(files):
            twin = next(file for file in files if stems[file.stem] != file)
            raise InputError(f"image {str(twin)!r} has the name of {str(stems[twin.stem])!r}; expected one file a name")
        found.append(stems)
    first, second = found
    for part, folder, files, others in ((*parts, first, second), (*parts[::-1], second, first)):
        alone = sorted(files.keys() - others.keys())
        if alone:
            raise InputError(
                f"{part.removesuffix('s')} {str(files[alone[0]])!r} is alone ({len(alone)} such); "
                f"expected a file named {alone[0]!r} in {str(root / folder)!r}"
            )
    return [(first[stem], second[stem]) for stem in first]


def _remedy(root: Path) -> str:
    name = root.parent.name
    if name in MAKERS:
        return f"prepare it with: python tools/make_data.py {name} --out {root.parent}"
    return "put the images there, or point the config's data_root at them"


class _NamesImages:
    """A data set that names an image that it cannot read."""

    def prepare_data(self, idx):
        try:
            return super().prepare_data(idx)
        except InputError:
            raise
        except (AssertionError, OSError, ValueError) as e:
            path = self.get_data_info(idx)["img_path"]
            raise InputError(f"cannot read image {path!r}; expected a whole image file ({_first_line(e)})") from e


def check_clips(data_root: str, part: str, make: str | None = None) -> None:
    """Make the clips where `make` says how to and the folder is absent; InputError where they are not there then."""
    if make and not Path(data_root).exists():
        MAKERS[make](data_root)
    path = Path(data_root, f"{part}.npy")
    if not path.is_file():
        raise InputError(f"clips {str(path)!r} not found; expected uint8 frames (clips, frames, height, width)")
    try:
        clips = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read clips {str(path)!r}; expected a whole .npy file ({_first_line(e)})") from e
    if clips.ndim != 4 or clips.dtype != np.uint8:
        raise InputError(f"clips {str(path)!r} are {clips.dtype} {clips.shape}; expected uint8 of four axes")


def find_scenes(data_root: str, sequences: list[str], labelled: bool = True) -> list[Path]:
    """SemanticKITTI's voxel files `sequences/<sequence>/voxels/<scene>.bin`, sorted.

    InputError where a sequence is missing or empty, or a scene lacks the `.label` and `.invalid` that it should have.
    """
    found = []
    for sequence in sequences:
        folder = Path(data_root, "sequences", str(sequence).zfill(2), "voxels")  # a command line makes 8 of "08"
        scenes = sorted(folder.glob("*.bin"))
        if not scenes:
            raise InputError(f"voxel folder {str(folder)!r} not found or empty; expected SemanticKITTI's <scene>.bin")
        for scene in scenes if labelled else ():
            for ending in (".label", ".invalid"):
                if not scene.with_suffix(ending).is_file():
                    raise InputError(f"voxels {str(scene)!r} are alone; expected {scene.stem + ending!r} beside them")
        found += scenes
    return found


def check_coco(data_root: str, ann_file: str, data_prefix: str = "") -> Path:
    """The path of a COCO file. InputError where it or the folder of its images is not there."""
    path, folder = Path(data_root, ann_file), Path(data_root, data_prefix)
    if not path.is_file():
        raise InputError(f"annotations {str(path)!r} not found; expected a COCO file (.json)")
    if not folder.is_dir():
        raise InputError(f"data folder {str(folder)!r} not found; expected the images of {str(path)!r}")
    return path


@mmengine.registry.DATASETS.register_module()
class Clips(Dataset):
    """The clips of a file ``data_root/part.npy``, uint8 ``(clips, frames, height, width)``, as `inputs` (T, 1, H, W).

    Args:
        data_root: folder of the files.
        part: name of the file, without its ending.
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.
    """

    def __init__(self, data_root: str, part: str, make: str | None = None):
        check_clips(data_root, part, make)
        self.clips = np.load(Path(data_root, f"{part}.npy"), mmap_mode="r")

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        return {"inputs": torch.from_numpy(self.clips[index].copy()).unsqueeze(1)}


@DATASETS.register_module()
class ImageFolder(_NamesImages, CustomDataset):
    """mmpretrain's folder-per-class dataset that refuses empty classes and names an image it cannot read.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.
    """

    def __init__(self, make: str | None = None, extensions=EXTENSIONS, **kwargs):
        super().__init__(extensions=extensions, **kwargs)

    def _find_samples(self):
        check_image_folder(self.img_prefix)
        return super()._find_samples()


@mmengine.registry.DATASETS.register_module()
class MaskedImages(_NamesImages, BaseDataset):
    """Images of `data_root/data_prefix/images` with their masks in `masks/` beside it, of equal names.

    Args:
        data_prefix: folder below `data_root`.
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.
    """

    def __init__(self, data_root: str, data_prefix: str = "", make: str | None = None, **kwargs):
        self.folder = Path(data_root, data_prefix)
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The paths of each image and its mask."""
        pairs = pair_files(self.folder)
        return [dict(img_path=str(image), seg_map_path=str(mask), seg_fields=[]) for image, mask in pairs]


@mmengine.registry.DATASETS.register_module()
class LabelMaps(_NamesImages, BaseSegDataset):
    """mmseg's data set of images with label maps of equal names, which names what it cannot read.

    Args:
        make: name of a data set of `tools/make_data.py`, written to `data_root` where that is absent.
    """

    def __init__(self, make: str | None = None, **kwargs):
        super().__init__(**kwargs)

    def prepare_data(self, idx):
        """A prepared image; InputError where its label map holds a label beside the classes'."""
        item = super().prepare_data(idx)
        if "gt_sem_seg" in getattr(item["data_samples"], "_data_fields", ()):
            known = len(self.metainfo["classes"])
            odd = [int(label) for label in item["data_samples"].gt_sem_seg.data.unique() if known <= label < 255]
            if odd:
                path, shift = self.get_data_info(idx)["seg_map_path"], int(self.reduce_zero_label)
                raise InputError(
                    f"label map {path!r} holds the label {odd[0] + shift}; expected 0 to {known - 1 + shift} or 255, "
                    f"as the data set has {known} classes"
                )
        return item


def check_label_maps(root: Path, prefix: dict, image_suffix: str, map_suffix: str) -> None:
    """InputError where a folder of a data set of mmseg is missing or empty, or an image has no label map."""
    folders = [root / prefix.get(key, "") for key in ("img_path", "seg_map_path")]
    names = []
    for folder, suffix in zip(folders, (image_suffix, map_suffix), strict=True):
        if not folder.is_dir():
            raise InputError(
                f"data folder {str(folder)!r} not found (looked in {str(folder.absolute())!r}); expected images and "
                f"label maps of equal names; {_remedy(root / 'x')}"
            )
        names.append({name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix)})
    if not names[0]:
        raise InputError(f"data folder {str(folders[0])!r} holds no image; expected files ending in {image_suffix}")
    alone = sorted(names[0] - names[1])
    if alone:
        raise InputError(
            f"image {str(folders[0] / (alone[0] + image_suffix))!r} has no label map ({len(alone)} such); expected "
            f"{str(folders[1] / (alone[0] + map_suffix))!r}"
        )


@mmengine.registry.TRANSFORMS.register_module()
class LoadMask(BaseTransform):
    """Adds the mask of a loaded image, as mmseg's transforms expect it: `gt_seg_map` (H, W) of 0 and 1.

    Raises InputError for a mask that cannot be read, is not of the image's size, or holds values beside 0 and 255 (or
    0 and 1).
    """

    def transform(self, results: dict) -> dict:
        path = results["seg_map_path"]
        try:
            with Image.open(path) as file:
                mask = np.asarray(file.convert("L"))
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"cannot read mask {path!r}; expected a whole image file ({_first_line(e)})") from e
        if mask.shape != results["img"].shape[:2]:
            size, expected = (f"{w} x {h}" for h, w in (mask.shape, results["img"].shape[:2]))
            raise InputError(f"mask {path!r} is {size}; expected {expected} as its image {results['img_path']!r}")
        values = np.bincount(mask.ravel(), minlength=256).nonzero()[0]
        odd = [int(value) for value in values if value not in (0, values[-1])]
        if odd or values[-1] not in (0, 1, 255):
            raise InputError(f"mask {path!r} holds the value {(odd or values)[-1]}; expected 0 and 255, or 0 and 1")
        results["gt_seg_map"] = (mask > 0).astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")
        return results


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def _check_segmentation(dataset) -> None:
    suffixes = dataset.get("img_suffix", ".jpg"), dataset.get("seg_map_suffix", ".png")
    check_label_maps(Path(dataset.data_root), dataset.data_prefix, *suffixes)


def _check_pairs(dataset) -> None:
    pair_files(Path(dataset.get("data_root", ""), dataset.get("data_prefix", "")), PAIRED[dataset.type])


# How the files of a data set of each type are checked, given its settings; `ImageFolder` is checked beside its model.
CHECKS = {
    "ADE20KDataset": _check_segmentation,
    "Clips": lambda d: check_clips(d.data_root, d.part, d.get("make")),
    "CocoImages": lambda d: check_coco(d.data_root, d.ann_file, d.data_prefix.img),
    "LabelMaps": _check_segmentation,
    **dict.fromkeys(PAIRED, _check_pairs),
    "PromptedMasks": lambda d: check_coco(d.data_root, d.ann_file, d.get("data_prefix", "")),
    "VoxelScenes": lambda d: find_scenes(d.data_root, d.sequences, d.get("labelled", True)),
}


def prepare_data(cfg) -> None:
    """Make the data sets that the config says how to make, then check every folder of images that it names.

    Raises InputError before anything of a run is written.
    """
    classes = None
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = (cfg.get(key) or {}).get("dataset", {})
        check, folders = CHECKS.get(dataset.get("type")), dataset.get("type") == "ImageFolder"
        if not check and (not folders or dataset.get("ann_file")):
            continue
        root = Path(dataset.get("data_root", ""))
        if dataset.get("make") and not root.exists():
            MAKERS[dataset["make"]](root)
        if check:
            check(dataset)
            continue
        folder = root / dataset.get("data_prefix", "")
        found = check_image_folder(folder)
        if classes is not None and found != classes:
            odd = ", ".join(sorted(set(found) ^ set(classes))[:4])
            raise InputError(f"data folder {str(folder)!r} has other classes than the training folder: {odd}")
        classes = found
        count = cfg.model.get("num_classes", len(found))
        if count != len(found):
            raise InputError(f"config key model.num_classes={count}: {str(folder)!r} has {len(found)} class folders")
