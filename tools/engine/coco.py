"""Annotations in COCO's format, fully checked before a run, so that nothing is skipped silently."""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import InputError, note

FAR = 10  # a coordinate this many image sides away is no slip, and would need endless memory


def check_coco(
    data_root: str, ann_file: str, data_prefix: str = "", classes: Sequence[str] | None = None, masks: bool = False
) -> Path:
    """The path of a COCO file, after a check of every image and annotation.

    Args:
        classes: for detection, the class names; every object then needs box, area and category.
        masks: whether every object must have a mask.

    Raises:
        InputError: the file, an image or the image folder is missing; an id is duplicated or refers to nothing; an
            object's box or mask is impossible. The message names the annotation.
    """
    path, folder = Path(data_root, ann_file), Path(data_root, data_prefix)
    if not path.is_file():
        raise InputError(f"annotations {str(path)!r} not found; expected a COCO file (.json)")
    if not folder.is_dir():
        raise InputError(f"data folder {str(folder)!r} not found; expected the images of {str(path)!r}")
    files = _checked(path, folder, None if classes is None else tuple(classes), masks, path.stat().st_mtime_ns)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"image {str(missing[0])!r} not found ({len(missing)} such); {str(path)!r} names it")
    return path


@functools.lru_cache(maxsize=8)  # files are checked by the run, then by its data sets
def _checked(path: Path, folder: Path, classes: tuple[str, ...] | None, masks: bool, written: int) -> list[Path]:
    try:
        coco = json.loads(path.read_text())
        images = _by_id(coco["images"], "image", path)
        names = None
        if classes is not None:
            names = {key: category["name"] for key, category in _by_id(coco["categories"], "category", path).items()}
            _check_classes([name for name in names.values() if name in classes], list(classes), path)
        annotations = _by_id(coco["annotations"], "annotation", path)
        sizes = {key: (int(image["height"]), int(image["width"])) for key, image in images.items()}
        # Detectors are also tested on images without objects; nothing else reads those.
        read = images if classes is not None else {annotation["image_id"] for annotation in annotations.values()}
        files = [folder / image["file_name"] for key, image in images.items() if key in read]
        small = []
        for key, annotation in annotations.items():
            fault = _fault(annotation, sizes, masks) or (names is not None and _unknown(annotation, names, classes))
            if fault:
                raise InputError(f"annotations {str(path)!r}: annotation {key} {fault}")
            if names is not None and (
                _hidden(annotation["bbox"], *sizes[annotation["image_id"]]) or annotation["area"] <= 0
            ):
                small.append(key)
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"annotations {str(path)!r} cannot be read ({type(e).__name__}: {e}); expected COCO's images and "
            "annotations"
        ) from e
    if small:
        note(f"{len(small)} objects of {str(path)!r} show no pixel and are left out, such as annotation {small[0]}")
    return files


def _by_id(entries: Iterable[dict], what: str, path: Path) -> dict:
    found = {}
    for entry in entries:
        if entry["id"] in found:
            raise InputError(f"annotations {str(path)!r}: two have the {what} id {entry['id']}; expected one each")
        found[entry["id"]] = entry
    return found


def _check_classes(found: list[str], classes: list[str], path: Path) -> None:
    if len(found) < len(classes):
        raise InputError(
            f"annotations {str(path)!r} have {len(found)} of the data set's {len(classes)} classes; expected a "
            f"category for each of {tuple(classes)}"
        )
    if found != classes:  # mmdet numbers classes in the file's order
        raise InputError(f"annotations {str(path)!r} name their categories in the order {found}; expected {classes}")


def _unknown(annotation: dict, names: dict, classes: Sequence[str]) -> str | None:
    key = annotation["category_id"]
    if names.get(key) in classes:
        return None
    name = f" ({names[key]!r})" if key in names else ""
    return f"has the unknown category {key}{name}; expected one of {tuple(classes)}"


def _hidden(box: Sequence[float], height: int, width: int) -> bool:
    """Whether mmdet leaves out an object with this box: it is below a pixel, or outside of its image."""
    x, y, w, h = box
    return w < 1 or h < 1 or min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0)


def _fault(annotation: dict, sizes: dict, masks: bool) -> str | None:
    """What is wrong with an annotation."""
    if annotation["image_id"] not in sizes:
        return f"is of the image {annotation['image_id']!r}, which the file does not have"
    height, width = sizes[annotation["image_id"]]
    box, mask = annotation.get("bbox"), annotation.get("segmentation")
    if box is not None and (len(box) != 4 or not _near(box, height, width) or min(box[2:]) < 0):
        return f"has the box {box}; expected x, y, width and height in an image of {width} x {height}"
    if not mask:
        return "has no mask; expected a segmentation" if masks and not annotation.get("iscrowd") else None
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return f"has the polygon {str(polygon)[:60]}; expected three points or more, x and y of each"
            if not _near(polygon, height, width):
                return f"has a polygon far outside of its image of {width} x {height}, or no numbers in it"
        return None
    counts = mask["counts"]
    if list(mask["size"]) != [height, width]:
        return f"has run lengths of the size {mask['size']}; expected {[height, width]} as its image"
    if isinstance(counts, list) and (min(counts, default=0) < 0 or sum(counts) != height * width):
        return f"has run lengths of {sum(counts)} pixels; expected {height * width}"
    return None


def _near(numbers: list, height: int, width: int) -> bool:
    return all(math.isfinite(value) and abs(value) <= FAR * max(height, width) for value in numbers)
