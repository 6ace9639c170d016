"""Reads weights from the checkpoints of any trainer: timm's, mmengine's, Lightning's, DDP's, `torch.compile`'s.

Like `linzoo.backbones.openmmlab`, this module needs mmengine.
"""

import argparse
import json
import pathlib
import pickle
import re
import sys
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.runner.checkpoint import get_torch_safe_globals
from safetensors import safe_open
from timm.models import model_entrypoint
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from .layers.checkpoint import unwrap_state_dict

__all__ = ["Checkpoint", "convert_state_dict", "load_plain", "read_checkpoint", "strip_prefixes"]

# What checkpoints contain besides tensors and plain data: mmengine's histories, NumPy's numbers, timm's arguments.
SAFE_GLOBALS = [
    *get_torch_safe_globals(),
    *(kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")),
    *(argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath),
]
AVERAGED = ("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "ema")
LAST = ("state_dict", "model", "model_state_dict", "network", "net", "params", "weights")
WRAPPERS = ("module.", "_orig_mod.", "model_ema.", "ema_model.", "model.", "network.", "net.")


class Checkpoint(NamedTuple):
    """A checkpoint's weights, and its class names if it has them."""

    state: dict[str, Tensor]
    classes: list[str] | None


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """Reads a file from `torch.save` or safetensors to the CPU, if it holds only tensors and plain data.

    Args:
        mmap: leave tensors on disk until they are used.

    Raises:
        ValueError: the file is damaged, or needs unpickling; the message says what it holds and how to convert it.
    """
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as f:
                return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL (\S+)|class (\S+)|(\S+\.\S+) was not an allowed", str(e))
        if not found:
            raise ValueError(f"checkpoint {path!r} cannot be read (UnpicklingError); expected a whole file") from e
        raise ValueError(
            f"checkpoint {path!r} holds a {next(filter(None, found.groups()))}, which only running foreign code reads; "
            "expected tensors and plain data. If you trust the file, convert it where that code is installed: "
            f"torch.save(torch.load({path!r}, weights_only=False)['state_dict'], 'weights.pth')"
        ) from e
    except Exception as e:  # a damaged or foreign file raises one of a dozen kinds, which all mean the same
        raise ValueError(
            f"checkpoint {path!r} cannot be read ({type(e).__name__}); expected a whole .safetensors file or one that "
            "torch.save wrote"
        ) from e


def read_checkpoint(source: str | Path) -> Checkpoint:
    """The weights in a file or behind a URL. If it has both averaged and last ones, the averaged, with a warning.

    Args:
        source: .safetensors (class names come from timm's `config.json` beside it), or a file from `torch.save`. Only
            tensors and plain data are unpickled. `FILE#name` takes the entry `name` of the file, such as `state_dict`
            for the last weights instead of the averaged ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or needs unpickling; the message says what it holds and how to convert it.
    """
    path, entry = str(source), None
    if path.startswith(("http://", "https://")):
        path = str(download_cached_file(path))
    if not Path(path).is_file() and "#" in path:
        path, _, entry = path.rpartition("#")
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path!r}: no such file")
    content = load_plain(path)
    classes, state = None, content
    if path.endswith(".safetensors"):
        config = Path(path).with_name("config.json")
        classes = json.loads(config.read_text()).get("label_names") if config.is_file() else None
    elif isinstance(content, Mapping) and isinstance(content.get("meta"), Mapping):
        classes = (content["meta"].get("dataset_meta") or {}).get("classes")
    if (
        isinstance(content, Mapping)
        and isinstance(facts := content.get("quantization"), Mapping)
        and facts.get("ranges")
    ):
        message = f"checkpoint {path!r} is quantised: its weights are rounded, what layers read is not"
        warnings.warn(message, stacklevel=2)
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        # mmengine's `state_dict` holds the averaged weights, if there are any, and its `ema_state_dict` the last ones.
        averaged = () if "message_hub" in state else AVERAGED
        entries = [name for name in (*averaged, *LAST) if isinstance(state.get(name), Mapping) and state[name]]
        if entry is not None:
            if not isinstance(state.get(entry), Mapping):
                raise ValueError(f"checkpoint {path!r} has no weights {entry!r}; expected one of {', '.join(entries)}")
            entries, entry = [entry], None
        if not entries:
            break
        others = [name for name in entries if name in LAST]
        if entries[0] in AVERAGED and others:
            warnings.warn(
                f"checkpoint {path!r} has averaged weights ({entries[0]}), which are taken; "
                f"for the last ones give '{path}#{others[0]}'",
                stacklevel=2,
            )
        state = state[entries[0]]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"checkpoint {path!r} holds no weights; expected tensors by their names")
    return Checkpoint(
        {str(k): v for k, v in state.items() if isinstance(v, Tensor)}, list(classes) if classes else None
    )


def strip_prefixes(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """A state dict without the prefixes that wrappers add, unless the model's own `names` start with them."""
    for prefix in WRAPPERS:
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        # A trainer's file may also hold tensors of a loss or a metric.
        if 3 * len(part) > len(state) and not any(name.startswith(prefix) for name in names):
            if prefix.removesuffix(".") in AVERAGED and len(part) < len(state):
                warnings.warn(f"the averaged weights ({prefix}*) of a checkpoint are taken, not the last", stacklevel=2)
            return strip_prefixes(part, names)
    return state


def convert_state_dict(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames a state dict of any trainer and layout, ours or the authors', to the names of a timm model.

    From a model around a backbone (a segmenter, a detector) it takes the backbone's part.
    """
    ours = model.state_dict()
    state = strip_prefixes(state, ours.keys())
    for prefix in ("backbone.model.", "backbone."):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if part and (prefix == "backbone.model." or not any(name.startswith(prefix) for name in ours)):
            state = part
            break
    if all(key in state and state[key].shape == value.shape for key, value in ours.items()):
        return state
    family = sys.modules[model_entrypoint(model.pretrained_cfg["architecture"]).__module__]
    convert: Any = getattr(family, "checkpoint_filter_fn", lambda state, model: unwrap_state_dict(state))
    return convert(dict(state), model)
