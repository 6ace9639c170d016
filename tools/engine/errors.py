"""Errors that a user can act on, and notes: one line each, no traceback."""

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """A wrong argument, config, checkpoint or image. The message names it, its value and what was expected."""


def note(line: str) -> None:
    """Prints on stderr, once for all processes, what a user did not ask for but should know."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'x'?)` for the known name nearest to `name`, or an empty string."""
    near = get_close_matches(name, [str(k) for k in known], n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def existing_file(argument: str, path: str) -> Path:
    """`path` as a Path; InputError naming `argument` if it is not a file."""
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no such file"
        raise InputError(f"{argument} {path!r}: {what}; expected an existing file")
    return Path(path)
