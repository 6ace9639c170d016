"""The `linzoo` command: `linzoo doctor`, `linzoo train CONFIG`, ... each the `main` of the tool of that name."""

import importlib
import importlib.metadata
import sys

COMMANDS = ("doctor", "models", "configs", "benchmark", "train", "test", "predict")


def main(argv: list[str] | None = None) -> int | None:
    """Runs the tool that the first argument names with the others."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"linzoo {importlib.metadata.version('linzoo')}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] not in ("-h", "--help")
        line = f"linzoo: unknown command {argv[0]!r}; " if asked else ""
        print(f"{line}usage: linzoo {{{','.join(COMMANDS)}}} ...", file=sys.stderr if asked else sys.stdout)
        return 2 if asked else 0
    try:
        tool = importlib.import_module(f"linzoo.tools.{argv[0]}")
    except ImportError as e:  # an optional part, or one that does not fit; its message says how to install it
        print(f"error: linzoo {argv[0]}: {e}", file=sys.stderr)
        return 2
    return tool.main(argv[1:])
