"""OpenMMLab's packages, imported in silence, whatever they say about optional parts that we do without."""

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from unittest import mock

# The first gives mmcv its operators.
TRAINING = (
    *("linzoo.backbones.openmmlab", "mmpretrain.datasets", "mmpretrain.models"),
    *("mmseg.datasets", "mmseg.evaluation", "mmseg.models"),
)


def import_openmmlab(*packages: str) -> None:
    """Import packages, those of training where none is named.

    Raises:
        ModuleNotFoundError: a package of training is missing; the message says how to install it.
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
    """As if transformers were not installed: mmpretrain cannot be imported beside versions later than those of 2023."""
    dependency, imported = importlib.import_module("mmpretrain.utils.dependency"), "transformers" in sys.modules
    if not imported:
        sys.modules["transformers"] = None
    try:
        with mock.patch.object(dependency, "WITH_MULTIMODAL", False):
            yield
    finally:
        if not imported:
            del sys.modules["transformers"]
