"""OpenMMLab's packages, imported in silence, whatever they say about optional parts that we do without."""

import contextlib
import importlib
import importlib.metadata
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
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _without_transformers():
            warnings.simplefilter("ignore")
            for package in packages or TRAINING:
                importlib.import_module(package)
    except ModuleNotFoundError as e:
        if packages:
            raise
        raise ModuleNotFoundError(f'{e.name} is missing; training needs: pip install "linzoo[train]"') from e


@contextlib.contextmanager
def _without_transformers() -> Iterator[None]:
    """As if transformers were not installed: mmpretrain cannot be imported beside versions later than those of 2023."""
    distribution, imported = importlib.metadata.distribution, "transformers" in sys.modules

    def found(name: str) -> importlib.metadata.Distribution:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    if not imported:
        sys.modules["transformers"] = None
    if decided := sys.modules.get("mmpretrain.utils.dependency"):  # it was imported before, beside transformers
        setattr(decided, "WITH_MULTIMODAL", False)  # noqa: B010
    try:
        with mock.patch("importlib.metadata.distribution", found):
            yield
    finally:
        if not imported:
            del sys.modules["transformers"]
