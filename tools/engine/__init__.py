"""The pieces that training configs name: runner, hooks, classifier, dataset, optimizer wrapper.

Importing the package registers them all, so a config only needs
`custom_imports = dict(imports=["linzoo.backbones", "linzoo.tools.engine"])`.
"""

import contextlib
import io
import warnings

# mmpretrain prints a line and warns about optional parts (compiled operators) that classification does without.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmpretrain.datasets
    import mmpretrain.models  # noqa: F401

from .classifier import Classifier
from .curves import CurveHook
from .data import ImageFolder
from .errors import InputError
from .export import ExportHook
from .optim import AutocastOptimWrapper, TimmWeightDecay
from .progress import ProgressHook
from .resume import ResumeHook
from .runner import Runner

__all__ = [
    "AutocastOptimWrapper",
    "Classifier",
    "CurveHook",
    "ExportHook",
    "ImageFolder",
    "InputError",
    "ProgressHook",
    "ResumeHook",
    "Runner",
    "TimmWeightDecay",
]
