"""Result files: written completely or not at all, and a separate place for each input's."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from .errors import InputError


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder to.

    If writing fails (a full disk, a quota, no permission), the partial output is removed.

    Raises:
        InputError: writing failed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
    except BaseException as e:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        if isinstance(e, (OSError, RuntimeError, SafetensorError)):  # torch raises RuntimeError
            reason = e.strerror if isinstance(e, OSError) and e.strerror else (str(e).splitlines() or [""])[0]
            line = f"cannot write {str(path)!r} ({reason}); nothing of it is left, what was written before is kept"
            raise InputError(line) from e
        raise


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Calls `write(partial)` on a temporary name in the same folder, then moves it to `path`: complete or absent."""
    path = Path(path)
    with whole(path) as partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save_image(pixels: np.ndarray, path: str | os.PathLike) -> None:
    """Writes pixels as PNG or TIFF, according to the file name."""
    kind = Path(path).suffix[1:]
    write_atomically(path, lambda partial: Image.fromarray(pixels).save(partial, format=kind))


def place(inputs: Sequence[Path], folder: Path, below: Path, ending: str, endings: Sequence[str]) -> list[Path]:
    """A file below `below` for each input, in the same place as the input below `folder`.

    If inputs differ only in their endings (a.jpg, a.png), the endings are kept (a.jpg.png, a.png.png).

    Args:
        ending: of the files.
        endings: those that inputs may have.

    Raises:
        InputError: two inputs would still share a file, or a file is itself an input.
    """
    names = [str(path.relative_to(folder)) for path in inputs]
    lengths = [len(next((e for e in endings if name.lower().endswith(e)), Path(name).suffix)) for name in names]
    stems = [name[: len(name) - length] for name, length in zip(names, lengths, strict=True)]
    count = Counter(stem.casefold() for stem in stems)  # some file systems ignore case
    both = zip(names, stems, strict=True)
    files = [below / ((stem if count[stem.casefold()] == 1 else name) + ending) for name, stem in both]
    taken = {}
    for path, file in zip(inputs, files, strict=True):
        if other := taken.get(str(file).casefold()):
            raise InputError(f"image {str(path)!r}: its result and that of {str(other)!r} are both {str(file)!r}")
        taken[str(file).casefold()] = path
    if clash := {file.resolve() for file in files} & {path.resolve() for path in inputs}:
        raise InputError(f"image {str(min(clash))!r} would be overwritten by a result; expected another --out")
    return files
