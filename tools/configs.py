"""Lists the training configs that come with LinZoo, under the names that `linzoo train` takes."""

import argparse
import fnmatch
import importlib.resources
import sys
from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Files of the shipped configs by name, ``cls/groupmamba_t_digits``, without the shared bases in ``_base_/``."""
    root = Path(str(importlib.resources.files("linzoo"))) / "configs"
    return {f"{file.parent.name}/{file.stem}": file for file in sorted(root.glob("[!_]*/[!_]*.py"))}


def main(argv: list[str] | None = None) -> int:
    """Command line of `linzoo configs`; exit status 1 if no name matches."""
    parser = argparse.ArgumentParser(prog="linzoo configs", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or wildcards: 'det/*vmamba*'")
    pattern = parser.parse_args(argv).pattern
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [name for name in shipped_configs() if fnmatch.fnmatch(name, wanted)]
    if not names:
        print(f"error: linzoo configs: no shipped config matches {pattern!r}", file=sys.stderr)
        return 1
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
