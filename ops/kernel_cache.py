"""Keeps compiled kernels between processes. Each file is checked before it is used."""

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import platformdirs

PATIENCE = 600  # seconds to wait for another process that compiles the same kernel


@functools.cache
def cache_dir() -> Path:
    """``$LINZOO_CACHE``, else the user's cache directory; `temporary_dir`, with a warning, if it cannot be written."""
    path = Path(os.environ.get("LINZOO_CACHE") or platformdirs.user_cache_dir("linzoo"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        return _instead(path, error)


@functools.cache
def temporary_dir() -> Path:
    """A directory that lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="linzoo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _instead(path: Path, error: Exception) -> Path:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    warnings.warn(
        f"LINZOO_CACHE: cannot use {path} ({reason}); kernels are compiled anew in every process. "
        "Set LINZOO_CACHE to a writable directory.",
        RuntimeWarning,
        stacklevel=3,
    )
    return temporary_dir()


def stored(name: str, make: Callable[[Path], None], folder: Path | None = None, anew: bool = False) -> Path:
    """The path of file `name` in the cache. ``make(path)`` writes it if it is missing or damaged.

    Each file has its SHA-256 beside it. A file cut short by a crash or a quota is made anew, with a warning. Several
    processes may start at once, so files are written under a lock and then moved into place. If the folder, or another
    user's lock, cannot be written, a temporary folder is used, with a warning that says why.

    Args:
        name: File name; it must encode everything that the contents depend on.
        make: Writes the contents.
        folder: Used instead of `cache_dir`.
        anew: Make the file even if it is there.
    """
    folder = folder or cache_dir()
    path = folder / name
    if not anew and _whole(path):
        return path
    try:
        with filelock.FileLock(f"{path}.lock", timeout=PATIENCE):
            if anew or not _whole(path):  # else another process was faster
                if path.exists() and not anew:
                    warnings.warn(f"{path} is damaged; it is made anew", RuntimeWarning, stacklevel=2)
                _write(path, make)
        return path
    except (OSError, NotImplementedError, filelock.Timeout) as error:
        if folder == temporary_dir():
            raise
        return stored(name, make, _instead(path, error), anew)


def _digest(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _whole(path: Path) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _digest(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, make: Callable[[Path], None]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        make(partial)
        code = partial.read_bytes()
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        partial.write_text(hashlib.sha256(code).hexdigest())
        os.replace(partial, _digest(path))
    finally:
        partial.unlink(missing_ok=True)
