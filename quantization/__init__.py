"""Quantisation of the zoo: transforms that keep a model's outputs, observers, and simulated quantisers."""

from .fake import LogQuantizer, Quantizer, log_sqrt2
from .gptq import gptq, second_moments
from .invariances import Axis, Slot, invariances
from .observers import BestRangeObserver, ChannelObserver, MinMaxObserver, PercentileObserver, best_range
from .reorder import clusters, sort_channels
from .reparam import fold_ranges, shift
from .rotation import block_hadamard, hadamard, has_hadamard, klt_rotation, rotation
from .smooth import read_maxima, smoothing
from .taps import layers, measure, tap, tapped
from .transforms import Online, fold_gains, permute, remove_online, rotate, scale

__all__ = [
    "Axis",
    "BestRangeObserver",
    "ChannelObserver",
    "LogQuantizer",
    "MinMaxObserver",
    "Online",
    "PercentileObserver",
    "Quantizer",
    "Slot",
    "best_range",
    "block_hadamard",
    "clusters",
    "fold_gains",
    "fold_ranges",
    "gptq",
    "hadamard",
    "has_hadamard",
    "invariances",
    "klt_rotation",
    "layers",
    "log_sqrt2",
    "measure",
    "permute",
    "read_maxima",
    "remove_online",
    "rotate",
    "rotation",
    "scale",
    "second_moments",
    "shift",
    "smoothing",
    "sort_channels",
    "tap",
    "tapped",
]
