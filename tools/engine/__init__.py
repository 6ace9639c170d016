"""The pieces that training configs name: runner, hooks, the models to train, data sets, metrics, optimizer wrapper.

Importing the package registers them all, so a config only needs
`custom_imports = dict(imports=["linzoo.backbones", "linzoo.tools.engine"])`.
"""

import contextlib
import io
import warnings

from linzoo.backbones.openmmlab import LinZooBackbone  # noqa: F401  (first: it gives mmcv its operators)

# mmpretrain and mmseg print lines and warn about optional parts (compiled operators) that we do without.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmpretrain.datasets
    import mmpretrain.models  # noqa: F401
    import mmseg.datasets
    import mmseg.evaluation
    import mmseg.models  # noqa: F401

from .classifier import Classifier, MesaHook
from .curves import CurveHook
from .data import Clips, ImageFolder, LabelMaps, LoadMask, MaskedImages
from .errors import InputError
from .export import ExportHook
from .next_frame import NextFrame, NextFrameMetric
from .occupancy import OccupancyMetric, SceneCompleter, VoxelScenes
from .optim import AutocastOptimWrapper, LayerDecay, TimmWeightDecay
from .progress import ProgressHook
from .promptable import PromptedMasks, PromptMetric, PromptSegmenter
from .restorer import PairedImages, RestorationMetric, Restorer
from .resume import ResumeHook
from .runner import Runner
from .segmenter import MaskMetric, Segmenter

__all__ = [
    "AutocastOptimWrapper",
    "Classifier",
    "Clips",
    "CurveHook",
    "ExportHook",
    "ImageFolder",
    "InputError",
    "LabelMaps",
    "LayerDecay",
    "LoadMask",
    "MaskMetric",
    "MaskedImages",
    "MesaHook",
    "NextFrame",
    "NextFrameMetric",
    "OccupancyMetric",
    "PairedImages",
    "ProgressHook",
    "PromptMetric",
    "PromptSegmenter",
    "PromptedMasks",
    "RestorationMetric",
    "Restorer",
    "ResumeHook",
    "Runner",
    "SceneCompleter",
    "Segmenter",
    "TimmWeightDecay",
    "VoxelScenes",
]
