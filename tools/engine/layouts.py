"""Recognises the layout of a user's folder, and brings it into the one layout of each task.

Nothing is copied: `arrange` makes links. A folder without a validation part is split 4 to 1, always in the same way.
"""

import csv
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from .classifier import find_classes
from .coco import check_coco
from .data import ENOUGH, pair_files, spread
from .errors import InputError, note
from .images import image_size, read_labels, read_pixels

TaskName = Literal["cls", "seg", "det", "restore"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
PAIRS: dict[TaskName, tuple[tuple[str, str], ...]] = {
    "seg": (("images", "masks"), ("images", "labels"), ("images", "annotations")),
    "restore": (("input", "target"),),
}
TABLES = ("metadata.csv", "labels.csv", "train.csv")
COLUMNS = {"image": ("file_name", "filename", "image", "path", "file"), "class": ("label", "class", "category")}
LAYOUTS = {
    "cls": "a folder of images per class, or a CSV file with the columns file_name and label",
    "seg": "images/ and masks/ with files of equal names",
    "det": "COCO annotations (.json) beside their images",
    "restore": "input/ and target/ with files of equal names",
}
SEED, SHARE = 0, 5  # one of SHARE images is for validation


@dataclass
class Arranged:
    """A data set in the layout of its task.

    Attributes:
        task: "cls", "seg", "det" or "restore".
        classes: names of the classes; none for restoration.
        counts: numbers of training and of validation images.
        side, shortest: median and minimum of the images' shorter sides.
        channels: 1 for grey images, 3 for colour (restoration).
        masks: whether objects have masks (detection).
        suffix: how the images' names end.
    """

    task: TaskName
    classes: list[str]
    counts: dict[str, int]
    side: int
    shortest: int
    channels: int = 3
    masks: bool = False
    suffix: str = ".png"


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of the parts `train` and `val`; "" for a folder without parts."""
    found = {part: folder / name for part, names in PARTS.items() for name in names[::-1] if (folder / name).is_dir()}
    return found if "train" in found else {"": folder}


def _table(data: Path) -> Path | None:
    """The CSV file of classes that `data` is or contains."""
    if data.suffix.lower() == ".csv":
        return data
    return next((data / name for name in TABLES if (data / name).is_file()), None)


def find_task(data: Path) -> TaskName:
    """The task that the layout of `data` indicates.

    Raises:
        InputError: there is no such file or folder, or no layout fits.
    """
    if not data.exists():
        raise InputError(f"DATA {str(data)!r}: no such file or folder; expected one of: {'; '.join(LAYOUTS.values())}")
    if data.suffix == ".json" or (data.is_dir() and _annotations(data)):
        return "det"
    inside = next(iter(_parts(data).values())) if data.is_dir() else data
    for task, pairs in PAIRS.items():
        if any((place / a).is_dir() and (place / b).is_dir() for a, b in pairs for place in (data, inside)):
            return task
    if _table(data) or (inside.is_dir() and any(f.is_dir() and not f.name.startswith(".") for f in inside.iterdir())):
        return "cls"
    raise InputError(
        f"DATA {str(data)!r} is of no layout that is known; expected one of: {'; '.join(LAYOUTS.values())}"
    )


def arrange(data: Path, task: TaskName, out: Path, names: Sequence[str] | None = None) -> Arranged:
    """Brings `data` into the layout of `task` below `out`, by links.

    Args:
        data: a user's file or folder.
        task: see `find_task`.
        out: written anew.
        names: class names for label maps.

    Raises:
        InputError: the data does not fit the task; the message names the file.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        arranged = _ARRANGE[task](data, partial, names)
        few = arranged.counts["train"]
        if few < 2:
            raise InputError(f"DATA {str(data)!r} has {few} image to train on; expected two at least")
        (partial / "classes.json").write_text(json.dumps(arranged.classes))
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return arranged


def _split(items: list[Any], kind_of: Any = lambda item: None) -> dict[str, list[Any]]:
    """One in SHARE of each kind for validation, at least one if there are two."""
    kinds, parts = defaultdict(list), {"train": [], "val": []}
    for item in items:
        kinds[kind_of(item)].append(item)
    stream = random.Random(SEED)
    for kind in sorted(kinds, key=str):
        stream.shuffle(kinds[kind])
        held = max(len(kinds[kind]) // SHARE, 1) if len(kinds[kind]) > 1 else 0
        parts["val"] += kinds[kind][:held]
        parts["train"] += kinds[kind][held:]
    note(f"no validation part: {len(parts['val'])} of {len(items)} images, drawn with seed {SEED}, validate")
    return parts


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a file system without links
        shutil.copy(source, target)


def _sides(files: Iterable[Path]) -> dict[str, int]:
    shorter = [min(image_size(file)) for file in files]
    return {"side": int(median(shorter)), "shortest": min(shorter)}


# --- classes ----------------------------------------------------------------------------------------------------------


def _read_table(table: Path) -> list[tuple[Path, str]]:
    """The images and classes of a CSV file; names are relative to its folder."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    given = list(rows[0]) if rows else []
    columns = [next((c for c in given if c.lower() in names), None) for names in COLUMNS.values()]
    if None in columns:
        raise InputError(f"table {str(table)!r} has the columns {given}; expected file_name and label")
    found = []
    for number, row in enumerate(rows, start=2):
        path, label = table.parent / (row[columns[0]] or ""), (row[columns[1]] or "").strip()
        if not path.is_file() or not label:
            missing = "no label" if path.is_file() else f"no such file {str(path)!r}"
            raise InputError(f"table {str(table)!r}, line {number}: {missing}; expected an image and its class")
        found.append((path, label.replace(os.sep, "_")))
    return found


def _arrange_classes(data: Path, out: Path, names: Sequence[str] | None) -> Arranged:
    parts = _parts(data) if data.is_dir() else {"": data}
    labelled = {}
    for part, folder in parts.items():
        table = _table(folder)
        labelled[part] = (
            _read_table(table) if table else [(f, c) for c, files in find_classes(folder).items() for f in files]
        )
    if "" in labelled:
        labelled = _split(labelled[""], lambda item: item[1])
    if "val" not in labelled:
        labelled = _split(labelled["train"], lambda item: item[1])
    counts = Counter(label for _, label in labelled["train"])
    if len(counts) < 2:
        raise InputError(f"DATA {str(data)!r} has one class, {next(iter(counts), 'none')!r}; expected two at least")
    unknown = sorted({label for _, label in labelled["val"]} - set(counts))
    if unknown:
        raise InputError(f"DATA {str(data)!r}: nothing of the class {unknown[0]!r} is in the training part")
    for part, items in labelled.items():
        for label in counts:
            (out / part / label).mkdir(parents=True)
        for i, (file, label) in enumerate(items):
            image_size(file)
            _link(file, out / part / label / f"{i:06d}_{file.name}")
    empty = [label for label in counts if not any((out / "val" / label).iterdir())]
    for label in empty:  # they have a single image; the readers expect every class in both parts
        file = next((out / "train" / label).iterdir())
        note(f"class {label!r} has one image, which trains and validates")
        _link(file, out / "val" / label / file.name)
    files = [file for file, _ in labelled["train"]]
    return Arranged("cls", sorted(counts), {part: len(items) for part, items in labelled.items()}, **_sides(files))


# --- pairs ------------------------------------------------------------------------------------------------------------


def _find_pairs(data: Path, task: TaskName) -> dict[str, list[tuple[Path, Path]]]:
    """Pairs of each part, whether train/ holds images/ or images/ holds train/."""
    for first, second in PAIRS[task]:
        inside, parts = _parts(data / first) if (data / first).is_dir() else {}, _parts(data)
        if "train" in inside:
            found = {}
            for part, folder in inside.items():
                place = f"{first}/{folder.name}", f"{second}/{folder.name}"
                found[part] = pair_files(data, place)
            return found
        if all((next(iter(parts.values())) / name).is_dir() for name in (first, second)):
            return {part: pair_files(folder, (first, second)) for part, folder in parts.items()}
    first, second = PAIRS[task][0]
    raise InputError(f"DATA {str(data)!r} holds no {first}/ and {second}/; expected {LAYOUTS[task]}")


def _both_parts(pairs: dict[str, list]) -> dict[str, list]:
    return pairs if {"train", "val"} <= pairs.keys() else _split(next(iter(pairs.values())))


def _arrange_maps(data: Path, out: Path, names: Sequence[str] | None) -> Arranged:
    pairs = _both_parts(_find_pairs(data, "seg"))
    values = set()
    everything = [pair for part in pairs.values() for pair in part]
    for image, label_map in everything:
        size, expected = image_size(label_map, "label map"), image_size(image)
        if size != expected:
            found, said = (f"{w} x {h}" for h, w in (size, expected))
            raise InputError(f"label map {str(label_map)!r} is {found}; expected {said} as its image {str(image)!r}")
    for _, label_map in spread(everything)[:ENOUGH]:
        values |= set(np.bincount(read_labels(label_map).ravel(), minlength=256).nonzero()[0].tolist())
    binary = values <= {0, 255} and 255 in values
    if binary:
        note("the maps hold 0 and 255 alone: two classes, 0 and 1")
        values = {0, 1}
    count = max(values - {255}, default=0) + 1
    listed = data / "classes.txt"
    names = names or (listed.read_text().split("\n") if listed.is_file() else None)
    names = [name.strip() for name in names if name.strip()] if names else [str(i) for i in range(count)]
    if len(names) < count or len(names) < 2:
        raise InputError(
            f"classes: {len(names)} names ({', '.join(names)}), but the maps hold the labels {sorted(values)}"
        )
    endings = {image.suffix.lower() for image, _ in everything}
    suffix = endings.pop() if len(endings) == 1 else ".image"
    for part, both in pairs.items():
        for image, label_map in both:
            _link(image, out / "images" / part / f"{image.stem}{suffix}")
            target = out / "maps" / part / f"{image.stem}.png"
            if binary:
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((read_labels(label_map) > 0).astype(np.uint8)).save(target)
            else:
                _link(label_map, target)
    counts = {part: len(both) for part, both in pairs.items()}
    return Arranged("seg", names, counts, suffix=suffix, **_sides(image for image, _ in pairs["train"]))


def _arrange_targets(data: Path, out: Path, names: Sequence[str] | None) -> Arranged:
    pairs = _both_parts(_find_pairs(data, "restore"))
    for part, both in pairs.items():
        for degraded, clean in both:
            _link(degraded, out / part / "input" / f"{degraded.stem}{degraded.suffix}")
            _link(clean, out / part / "target" / f"{degraded.stem}{clean.suffix}")
    pixels = read_pixels(pairs["train"][0][0])
    counts = {part: len(both) for part, both in pairs.items()}
    sides = _sides(image for both in pairs.values() for image, _ in both)
    return Arranged("restore", [], counts, channels=3 if pixels.ndim == 3 else 1, **sides)


# --- objects ----------------------------------------------------------------------------------------------------------


def _annotations(data: Path) -> list[Path]:
    """COCO files at `data`, in it, in its `annotations/` or in its parts; of COCO's own files, those with objects."""
    if data.suffix == ".json":
        return [data]
    folders = [data, data / "annotations", *(folder for part, folder in _parts(data).items() if part)]
    found = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    found = [file for file in found if file.name.startswith("instances")] or found
    return [file for file in found if b'"annotations"' in file.read_bytes()]


def _arrange_objects(data: Path, out: Path, names: Sequence[str] | None) -> Arranged:
    files = _annotations(data)
    if not files:
        raise InputError(f"DATA {str(data)!r} holds no annotations; expected {LAYOUTS['det']}")
    said = {file: str(file.relative_to(data)).lower() if data.is_dir() else file.stem.lower() for file in files}
    named = {p: f for f in files for p, words in PARTS.items() if any(word in said[f] for word in words)}
    whole = named if {"train", "val"} <= named.keys() else {"": named.get("train", files[0])}
    if "" in whole and len(files) > 1:
        raise InputError(
            f"DATA {str(data)!r} holds {len(files)} files of annotations; expected train and val in two names"
        )
    coco, parts = {}, {}
    for part, file in whole.items():
        try:
            coco[part] = json.loads(file.read_text())
            images = coco[part]["images"]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"annotations {str(file)!r}: no COCO file ({e})") from e
        root = data if data.is_dir() else file.parent
        inside = (part or "train", file.stem.rpartition("_")[2])  # train, or train2017 from instances_train2017.json
        folders = [file.parent, root, root / "images", file.parent.parent]
        folders += [
            root / above / name / below for name in inside for above in ("", "images") for below in ("", "images")
        ]
        folder = next((f for f in folders if images and (f / images[0]["file_name"]).is_file()), file.parent)
        classes = [category["name"] for category in coco[part]["categories"]]
        check_coco("", str(file), str(folder), classes)
        parts[part] = [(image, folder / image["file_name"]) for image in images]
    if "" in parts:
        coco = {"train": coco[""], "val": coco[""]}
        parts = _split(parts[""])
    for part, items in parts.items():
        kept = {image["id"] for image, _ in items}
        content = {
            **coco[part],
            "images": [{**image, "file_name": f"{image['id']}_{file.name}"} for image, file in items],
            "annotations": [a for a in coco[part]["annotations"] if a["image_id"] in kept],
        }
        for image, file in items:
            _link(file, out / part / f"{image['id']}_{file.name}")
        (out / f"{part}.json").write_text(json.dumps(content))
    objects = [a for part in {id(c): c for c in coco.values()}.values() for a in part["annotations"]]
    if not objects:
        raise InputError(f"annotations {str(files[0])!r} hold no object; expected some to train on")
    classes = [category["name"] for category in coco["train"]["categories"]]
    counts = {part: len(items) for part, items in parts.items()}
    masks = all(a.get("segmentation") for a in objects)
    return Arranged("det", classes, counts, masks=masks, **_sides(file for _, file in parts["train"]))


_ARRANGE = {"cls": _arrange_classes, "seg": _arrange_maps, "det": _arrange_objects, "restore": _arrange_targets}
