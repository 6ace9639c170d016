"""What the command lines of the training tools share."""

import argparse
import functools
import sys
from collections.abc import Callable

from mmengine.config import DictAction

from .errors import InputError


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser that knows CONFIG and --cfg-options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override the config")
    return parser


def command(main: Callable) -> Callable:
    """Decorates a tool's `main(argv=None)`: an InputError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except InputError as e:
            # An error raised in a data-loader worker carries the worker's traceback before its own message.
            line = str(e).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return run
