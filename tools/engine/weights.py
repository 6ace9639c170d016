"""Loads checkpoints strictly, and tells which model they belong to."""

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from linzoo.backbones import checkpoints
from linzoo.backbones.layers.adapters import plain_to_adapted
from linzoo.backbones.layers.without_memory import without_memory
from linzoo.backbones.openmmlab import LinZooBackbone
from linzoo.quantization.quantize import simulate

from .errors import InputError, note


class Fit(NamedTuple):
    """A checkpoint's tensors under a model's names, and the model's tensors that start from random weights."""

    state: dict[str, Tensor]
    anew: list[str]


def simulation(path: str | Path) -> dict[str, Any] | None:
    """How `linzoo quantize` rounds the inputs of layers, if a file says so (see `linzoo.quantization.quantize`)."""
    try:
        plain = Path(path).is_file() and not str(path).endswith(".safetensors")
        content = checkpoints.load_plain(path, mmap=True) if plain else None
    except ValueError:  # read_checkpoint says what is wrong
        return None
    facts = content.get("quantization") if isinstance(content, Mapping) else None
    return facts.get("simulation") if isinstance(facts, Mapping) else None


def read_checkpoint(path: str | Path, simulated: bool = False) -> checkpoints.Checkpoint:
    """`linzoo.backbones.checkpoints.read_checkpoint`, with InputError for unreadable files.

    A model name instead of a path means its published weights.

    Args:
        simulated: The caller rounds the inputs of layers where the file says how: then there is no warning.
    """
    if not Path(path).exists() and timm.is_model(str(path).partition(".")[0]):
        return checkpoints.Checkpoint(create_model(str(path), pretrained=True).state_dict(), None)
    try:
        with warnings.catch_warnings():
            if simulated and simulation(path):
                warnings.filterwarnings("ignore", "checkpoint .* is quantised")
            return checkpoints.read_checkpoint(path)
    except FileNotFoundError as e:
        what = "a folder" if Path(path).is_dir() else "no such file"
        raise InputError(f"checkpoint {str(path)!r}: {what}; expected an existing file") from e
    except ValueError as e:
        raise InputError(str(e)) from e


def load_weights(model: nn.Module, path: str | Path, simulated: bool = False) -> list[str] | None:
    """Loads every tensor of a checkpoint from any trainer, in any layout; returns the checkpoint's class names.

    Args:
        model: the result of `timm.create_model`, or a segmenter or detector around a backbone.
        path: see `read_checkpoint`.
        simulated: round the inputs of layers as the file of `linzoo quantize` says; other files change nothing.

    Raises:
        InputError: tensors differ in name or shape; the message says which registered variant they fit.
    """
    state, classes = read_checkpoint(path, simulated)
    model.load_state_dict(fit(model, state, path).state, strict=False)
    if simulated and (how := simulation(path)):
        try:
            simulate(model, how)
        except ValueError as e:
            raise InputError(f"checkpoint {str(path)!r}: {e}") from e
        note(f"checkpoint {str(path)!r} is quantised: the inputs of {len(how['inputs'])} layers are rounded, too")
    return classes


def load_start(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint to start training from; a classifier with other classes starts anew, with a note.

    Raises:
        InputError: other tensors differ in name or shape.
    """
    found = fit(model, read_checkpoint(path).state, path, start=True)
    if next(model.parameters()).is_meta:
        return  # only the check was needed
    model.load_state_dict(found.state, strict=False)
    if found.anew:
        note(f"the checkpoint {str(path)!r} has another classifier; these begin anew: {', '.join(found.anew)}")


def fit(model: nn.Module, state: dict[str, Tensor], path: str | Path, start: bool = False) -> Fit:
    """The tensors of `state` that `model` has, under its names.

    Args:
        start: whether classifiers may start anew: missing tensors, or those with another number of classes.

    Raises:
        InputError: tensors differ in name or shape; the message names the variant that they fit.
    """
    backbone = getattr(model, "backbone", None)
    dense = not hasattr(model, "pretrained_cfg") and isinstance(backbone, nn.Module)
    ours = model.state_dict()
    try:
        if dense:
            state = dict(checkpoints.strip_prefixes(state, ours.keys()))
            if isinstance(backbone, LinZooBackbone):
                backbone._convert_published(state, "backbone.")
        else:
            state = checkpoints.convert_state_dict(state, model)
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError):
        pass  # no layout that the family knows: differences are reported below
    state = plain_to_adapted(state, ours)
    want, have = _shapes(ours), _shapes(state)
    # Old files have no step counts of BatchNorms.
    wrong = {key for key in want.keys() | have.keys() if want.get(key) != have.get(key)}
    wrong -= {key for key in wrong if key.endswith("num_batches_tracked") and key not in have}
    heads = _heads(model) if start else ()
    anew = sorted(key for key in wrong & want.keys() if key.startswith(heads) and _may_begin_anew(key, want, have))
    wrong -= {*anew, *(key for key in wrong - want.keys() if key.startswith(heads))}
    if not wrong:
        return Fit({key: value for key, value in state.items() if key in want and key not in anew}, anew)
    inner = model if not dense else getattr(backbone, "model", None)
    name = getattr(inner, "pretrained_cfg", {}).get("architecture", type(backbone or model).__name__)
    which = f"the config's {type(model).__name__} with {name!r}" if dense else f"model {name!r}"
    part = {k.removeprefix("backbone.model."): v for k, v in have.items() if k.startswith("backbone.model.")}
    fits = _variant_of(part or have, name, getattr(model, "num_classes", None))
    key = min(wrong)
    raise InputError(
        f"checkpoint {str(path)!r} does not fit {which}: {len(wrong)} tensors differ, such as {key!r} "
        f"(checkpoint {have.get(key, 'absent')}, model {want.get(key, 'absent')}); "
        + (f"it fits {fits}" if fits else "no registered variant of the zoo fits it")
    )


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of tensors that depend on the number of classes."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    dense = ("decode_head.", "auxiliary_head.", "bbox_head.", "roi_head.", "head.", "heads.")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names)) or dense


def _may_begin_anew(key: str, want: dict, have: dict) -> bool:
    """Whether a head's tensor is missing, or differs only in its first axis, as a classifier's does."""
    return key not in have or want[key][1:] == have[key][1:]


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _variant_of(shapes: dict, name: str, num_classes: int | None) -> str | None:
    """The registered model of the zoo, or of the family of `name`, that has these shapes, as a phrase."""
    if not shapes:
        return None
    family = timm.model_entrypoint(name).__module__ if timm.is_model(name) else None
    modules = {variant: timm.model_entrypoint(variant).__module__ for variant in timm.list_models()}
    variants = [v for v, module in modules.items() if module == family or module.startswith("linzoo.")]
    # The lengths of the head's vectors are candidates for the number of classes.
    counts = [num_classes, *sorted({shape[0] for key, shape in shapes.items() if len(shape) == 1 and "head" in key})]
    for variant in sorted(variants, key=lambda v: (v != name, modules[v] != family)):
        try:
            bare = _shapes_of(variant, 0)
        except (RuntimeError, ValueError):  # the model needs classes
            continue
        if bare.items() > shapes.items():  # a backbone without its norm, as in a segmenter or detector
            return repr(variant)
        if not shapes.items() >= bare.items():
            continue
        for count in counts:
            if _shapes_of(variant, count) == shapes:
                return f"{variant!r} with num_classes={count}"
    return None


@functools.cache
def _shapes_of(variant: str, num_classes: int | None) -> dict[str, tuple[int, ...]]:
    with without_memory():
        return _shapes(timm.create_model(variant, num_classes=num_classes).state_dict())


def weights_file(model_name: str, pretrained: bool | str, overlay: dict | None) -> str | None:
    """The file or URL that a model starts from, if there is one; None for published weights, or for none.

    InputError if published weights are requested and there are none.
    """
    if pretrained is not True:
        return pretrained or None
    cfg = vars(get_pretrained_cfg(model_name) or PretrainedCfg()) | (overlay or {})
    if not any(cfg[key] for key in ("url", "hf_hub_id", "file", "state_dict", "source")):
        raise InputError(f"pretrained=True: no weights of {model_name!r} are published; expected a file of them")
    return (overlay or {}).get("file")


def create_model(
    model_name: str, *args, pretrained: bool | str = False, pretrained_cfg_overlay: dict | None = None, **kwargs
) -> nn.Module:
    """`timm.create_model`, whose `pretrained` may also be a file or URL of weights, from any trainer, in any layout.

    A classifier with another number of classes starts anew. timm's `pretrained_cfg_overlay=dict(file=...)` works alike.

    Raises:
        InputError: the file is missing or another model's; there are no published weights.
    """
    file = weights_file(model_name, pretrained, pretrained_cfg_overlay)
    if overlay := {key: value for key, value in (pretrained_cfg_overlay or {}).items() if key != "file"}:
        kwargs["pretrained_cfg_overlay"] = overlay
    try:
        model = timm.create_model(model_name, *args, pretrained=pretrained is True and file is None, **kwargs)
    except FileNotFoundError as e:  # weights in a package that is not installed
        raise InputError(str(e)) from e
    if file is not None:
        load_start(model, file)
    return model
