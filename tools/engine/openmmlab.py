"""Imports OpenMMLab's packages without their messages about optional parts that we do not need."""

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from unittest import mock

# The first one gives mmcv its operators.
TRAINING = (
    *("linzoo.backbones.openmmlab", "mmpretrain.datasets", "mmpretrain.models"),
    *("mmseg.datasets", "mmseg.evaluation", "mmseg.models"),
)


def import_openmmlab(*packages: str) -> None:
    """Imports packages; without arguments, those that training needs.

    Raises:
        ModuleNotFoundError: a package for training is missing; the message says how to install it.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _without_transformers():
                for package in packages or TRAINING:
                    importlib.import_module(package)
    except ModuleNotFoundError as e:
        if packages:
            raise
        raise ModuleNotFoundError(f'{e.name} is missing; training needs: pip install "linzoo[train]"') from e


@contextlib.contextmanager
def _without_transformers() -> Iterator[None]:
    """Hides transformers: mmpretrain cannot be imported with versions later than those of 2023."""
    dependency, imported = importlib.import_module("mmpretrain.utils.dependency"), "transformers" in sys.modules
    if not imported:
        sys.modules["transformers"] = None
    try:
        with mock.patch.object(dependency, "WITH_MULTIMODAL", False):
            yield
    finally:
        if not imported:
            del sys.modules["transformers"]
