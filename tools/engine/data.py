"""Data sets: made if the config says how, and checked before a run writes anything."""

import inspect
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

from mmengine.config import Config
from mmengine.registry import DATASETS

from ..make_data import MAKERS
from .errors import InputError
from .images import ENDINGS, find_files

ENOUGH = 1000  # label maps per data set whose values are read before a run


class NamesImages:
    """A data set that names any image that it cannot read."""

    def prepare_data(self, idx: int) -> dict:
        """A prepared image."""
        try:
            return super().prepare_data(idx)
        except InputError:
            raise
        except (AssertionError, OSError, ValueError) as e:
            path, reason = self.get_data_info(idx)["img_path"], first_line(e)
            raise InputError(f"cannot read image {path!r}; expected a whole image file ({reason})") from e


def pair_files(
    root: str | Path, parts: tuple[str, str] = ("images", "masks"), suffix: str = ""
) -> list[tuple[Path, Path]]:
    """Images of `root/images` with the masks of equal stem in `root/masks`, or from two other folders, sorted.

    Stems of the first folder may end with `suffix`, which is removed.

    InputError if a folder is missing or empty, a file has no partner, or two files have the same stem.
    """
    root, found = Path(root), []
    for part in parts:
        folder = existing_folder(root / part, f"expected {parts[0]}/ and {parts[1]}/ with files of equal names", root)
        files = find_files(folder, deep=False)
        if not files:
            raise InputError(f"data folder {str(folder)!r} holds no image; expected files ending in {ENDINGS}")
        ending = suffix if part is parts[0] else ""
        stems = {file.stem.removesuffix(ending): file for file in files}
        if len(stems) < len(files):
            twin, other = next((f, kept) for f in files if (kept := stems[f.stem.removesuffix(ending)]) != f)
            raise InputError(f"image {str(twin)!r} has the name of {str(other)!r}; expected one file a name")
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


Item = TypeVar("Item", bound=Sized)


def in_layout(layouts: dict[str, Callable[[Path, str], Item]], data_root: str | Path, part: str, layout: str) -> Item:
    """What the reader of a layout finds for a part of a data set; InputError for an unknown layout, or no files."""
    if layout not in layouts:
        raise InputError(f"layout={layout!r}; expected one of {', '.join(layouts)}")
    found = layouts[layout](Path(data_root), part)
    if not found:
        raise InputError(f"data folder {str(data_root)!r} holds no clip of part {part!r}; expected layout {layout!r}")
    return found


def existing_folder(folder: str | Path, expected: str, root: str | Path) -> Path:
    """`folder` as a Path; if it is missing, an InputError that says how to make the data set of `root`."""
    folder, name = Path(folder), Path(root).name if Path(root).name in MAKERS else Path(root).parent.name
    if not folder.is_dir():
        of = next((path for path in (Path(root), Path(root).parent) if path.name == name), root)
        remedy = "put the images there, or point the config's data_root at them"
        if name in MAKERS:
            remedy = f"prepare it with: python tools/make_data.py {name} --out {of}"
        where = f"data folder {str(folder)!r} not found (looked in {str(folder.absolute())!r})"
        raise InputError(f"{where}; {expected}; {remedy}")
    return folder


def first_line(e: Exception) -> str:
    """The first line of an error's message."""
    return (str(e).splitlines() or [type(e).__name__])[0]


def check_heads(model: Any, classes: Sequence[str], path: str = "model") -> None:
    """InputError if an OpenMMLab head has another number of classes than its data set."""
    for key, value in model.items() if isinstance(model, dict) else enumerate(model) if isinstance(model, list) else ():
        if key == "num_classes" and value != len(classes):
            raise InputError(f"config key {path}.num_classes={value}: the data set has {len(classes)} classes")
        if key not in ("data_preprocessor", "semantic_head"):
            check_heads(value, classes, f"{path}.{key}")


def spread(files: list, count: int = ENOUGH) -> list:
    """All of a list, starting with `count` of them spread from end to end."""
    step = max(len(files) // count, 1)
    return files[::step] + [file for i, file in enumerate(files) if i % step]


def _data_sets(node: Any, scope: str | None) -> Iterator[tuple[dict, Callable]]:
    """The settings of every data set in a loader's settings, including wrapped ones, each with its check."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _data_sets(item, scope)
    elif isinstance(node, dict):
        kind = node.get("type")
        if isinstance(kind, str):
            kind = DATASETS.get(f"{scope}.{kind}" if scope and "." not in kind else kind)
        for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
            if check := vars(base).get("check") or CHECKS.get(base.__name__):
                yield node, getattr(kind, "check", check)
                break
        for value in node.values():
            yield from _data_sets(value, scope)


# How to check the files of other packages' data sets, by base class.
CHECKS: dict[str, Callable[[dict, Config], Any]] = {}


def prepare_data(cfg: Config) -> None:
    """Makes the data sets that the config says how to make, then checks the files of every data set in it.

    A data set's check is its class's static method `check(settings, cfg)`, which may return the class names.

    Raises:
        InputError: before a run writes anything.
    """
    classes = None
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for settings, check in _data_sets((cfg.get(key) or {}).get("dataset", {}), cfg.get("default_scope")):
            root = Path(settings.get("data_root") or "")
            if settings.get("make") and not root.exists():
                MAKERS[settings["make"]](root)
            found = check(settings, cfg)
            if found is None:
                continue
            if classes is not None and found != classes:
                odd = ", ".join(sorted(set(found) ^ set(classes))[:4])
                raise InputError(f"data folder {str(root)!r} has other classes than the training folder: {odd}")
            classes = found
