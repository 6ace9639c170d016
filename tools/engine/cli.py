"""Shared code for the command lines of the training tools."""

import argparse
import functools
import logging
import sys
import warnings
from collections.abc import Callable

from mmengine.config import DictAction

from linzoo.backbones.openmmlab_ops import MissingOperator

from .errors import InputError, note


class _Options(DictAction):
    """mmengine's KEY=VALUE, with an InputError for values that it cannot read, and with blanks in paths kept."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
            for key, value in (item.split("=", 1) for item in values or ()):
                if " " in value and not set("[](),") & set(value):
                    getattr(namespace, self.dest)[key] = value
        except (AssertionError, RecursionError, ValueError) as e:
            given = " ".join(values or ())
            raise InputError(f"--cfg-options {given}: expected KEY=VALUE of numbers, names and lists of them") from e


def config_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with CONFIG and --cfg-options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file")
    add_cfg_options(parser)
    return parser


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds --cfg-options."""
    parser.add_argument("--cfg-options", nargs="+", action=_Options, metavar="KEY=VALUE", help="override the config")


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Decorates a tool's `main(argv=None)`: wrong input and failed writes end with a line on stderr and status 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        raises, logging.raiseExceptions = logging.raiseExceptions, False  # a full disk is reported once, below
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                main(argv)
        except MissingOperator as e:
            line = str(e)
        except InputError as e:
            # An error in a data-loader worker has the worker's traceback before its own message.
            line = str(e).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        except OSError as e:
            line = f"{e.strerror or e}" + (f": {str(e.filename)!r}" if e.filename else "")
        else:
            return
        finally:
            logging.raiseExceptions = raises
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)

    return run


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Shows our warnings as notes for users, and others as Python does."""
    if "linzoo" in filename:
        note(str(message))
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)
