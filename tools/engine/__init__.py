"""The parts that training configs refer to: runner, hooks, models to train, data sets, metrics, optimizer wrapper.

Importing the package registers them all, so a config only needs
`custom_imports = dict(imports=["linzoo.backbones", "linzoo.tools.engine"])`.
"""

from .openmmlab import import_openmmlab

import_openmmlab()

from linzoo.backbones.openmmlab import LinZooBackbone  # noqa: E402

from .classifier import Classifier, ImageFolder, MesaHook  # noqa: E402
from .clips import ClipClassifier, ClipFolder  # noqa: E402
from .curves import CurveHook  # noqa: E402
from .dense import LabelMaps  # noqa: E402
from .errors import InputError  # noqa: E402
from .export import ExportHook  # noqa: E402
from .forecasting import Forecaster, ForecastMetric, Series  # noqa: E402
from .generation import FlowMatching, GenerationMetric, ImageTokenizer, NextScale  # noqa: E402
from .images import LoadImage  # noqa: E402
from .interpolation import InterpolationMetric, Interpolator, Triplets  # noqa: E402
from .next_frame import Clips, NextFrame, NextFrameMetric  # noqa: E402
from .occupancy import OccupancyMetric, SceneCompleter, VoxelScenes  # noqa: E402
from .optim import AutocastOptimWrapper, Kar3, LayerDecay, TimmWeightDecay  # noqa: E402
from .progress import ProgressHook  # noqa: E402
from .promptable import PromptedMasks, PromptMetric, PromptSegmenter  # noqa: E402
from .qat import AnnealHook  # noqa: E402
from .restorer import PairedImages, RestorationMetric, Restorer  # noqa: E402
from .resume import ResumeHook  # noqa: E402
from .runner import Runner  # noqa: E402
from .segmenter import LoadMask, MaskedImages, MaskMetric, Segmenter  # noqa: E402
from .shards import TimmImages, TimmShards  # noqa: E402
from .sparsity import SparseHook  # noqa: E402
from .task import Task, TimmModel  # noqa: E402
from .tracking import ClipMetric, ClipSegmenter, MaskedClips  # noqa: E402
from .volumes import VolumeMetric, Volumes, VolumeSegmenter  # noqa: E402

__all__ = [
    "AnnealHook",
    "AutocastOptimWrapper",
    "Classifier",
    "ClipClassifier",
    "ClipFolder",
    "ClipMetric",
    "ClipSegmenter",
    "Clips",
    "CurveHook",
    "ExportHook",
    "ForecastMetric",
    "Forecaster",
    "FlowMatching",
    "GenerationMetric",
    "ImageFolder",
    "ImageTokenizer",
    "InputError",
    "InterpolationMetric",
    "Interpolator",
    "Kar3",
    "LabelMaps",
    "LayerDecay",
    "LinZooBackbone",
    "LoadImage",
    "LoadMask",
    "MaskMetric",
    "MaskedClips",
    "MaskedImages",
    "MesaHook",
    "NextFrame",
    "NextFrameMetric",
    "NextScale",
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
    "Series",
    "SparseHook",
    "Task",
    "TimmImages",
    "TimmModel",
    "TimmShards",
    "TimmWeightDecay",
    "Triplets",
    "VolumeMetric",
    "VolumeSegmenter",
    "Volumes",
    "VoxelScenes",
]
