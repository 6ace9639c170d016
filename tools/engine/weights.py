"""Reading checkpoints strictly, and telling which model they belong to."""

import json
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from linzoo.backbones.openmmlab import SAFE_GLOBALS

from .errors import InputError, existing_file


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """The weights of a checkpoint and its class names, where it knows them.

    Args:
        path: `.safetensors` (class names from timm's `config.json` beside it) or a checkpoint of mmengine. Nothing but
            tensors and plain data is unpickled.
    """
    path = existing_file("checkpoint", str(path))
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            config = path.with_name("config.json")
            return state, json.loads(config.read_text()).get("label_names") if config.is_file() else None
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return dict(checkpoint["state_dict"]), checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes")
    except Exception as e:  # a damaged or foreign file raises one of a dozen kinds, and all mean the same
        raise InputError(
            f"checkpoint {str(path)!r} cannot be read ({type(e).__name__}); "
            "expected a whole .safetensors file or a checkpoint written by train.py"
        ) from e


def load_weights(model: nn.Module, path: str | Path) -> list[str] | None:
    """Load a checkpoint into a timm model, every tensor of it; the class names that the checkpoint knows.

    Args:
        model: what `timm.create_model` returned.
        path: see `read_checkpoint`.

    Raises:
        InputError: tensors differ in name or shape; the message says which registered variant they fit.
    """
    state, classes = read_checkpoint(path)
    check_fit(model, state, path)
    model.load_state_dict(state)
    return classes


def check_fit(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """InputError where the tensors of `state` are not those of `model`, naming the variant that they fit."""
    want, have = _shapes(model.state_dict()), _shapes(state)
    if want == have:
        return
    wrong = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
    key, name = wrong[0], model.pretrained_cfg["architecture"]
    fits = _variant_of(have, name, getattr(model, "num_classes", None))
    raise InputError(
        f"checkpoint {str(path)!r} does not fit model {name!r}: {len(wrong)} tensors differ, such as {key!r} "
        f"(checkpoint {have.get(key, 'absent')}, model {want.get(key, 'absent')}); "
        + (f"it fits {fits}" if fits else "no registered variant of the zoo fits it")
    )


def load_parts(model: nn.Module, path: str | Path) -> list[str] | None:
    """Load a segmenter's or detector's checkpoint, every tensor of it; the class names that the checkpoint knows.

    A checkpoint of the authors' own model is converted (see `LinZooBackbone`).

    Raises:
        InputError: tensors differ in name or shape.
    """
    state, classes = read_checkpoint(path)
    check_parts(model, state, path)
    return classes


def check_parts(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load `state` into a segmenter or detector; InputError where its tensors are not those of the model."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as e:  # shapes
        wrong = [line.strip() for line in str(e).splitlines()[1:]]
    else:
        # Files of old have no step counts of BatchNorms.
        wrong = [f"no {key!r}" for key in missing if not key.endswith("num_batches_tracked")]
        wrong += [f"{key!r} is not in the model" for key in unexpected]
    if wrong:
        name = model.backbone.model.pretrained_cfg["architecture"]
        raise InputError(
            f"checkpoint {str(path)!r} does not fit the config's {type(model).__name__} with {name!r}: "
            f"{len(wrong)} tensors differ, such as: {wrong[0]}"
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _variant_of(shapes: dict, name: str, num_classes: int | None) -> str | None:
    """The registered model of the zoo, or of the family of `name`, that has these shapes, as a phrase."""
    family = timm.model_entrypoint(name).__module__
    modules = {variant: timm.model_entrypoint(variant).__module__ for variant in timm.list_models()}
    variants = [v for v, module in modules.items() if module == family or module.startswith("linzoo.")]
    # The lengths of the head's vectors are the candidates for the number of classes.
    counts = [num_classes, *sorted({shape[0] for key, shape in shapes.items() if len(shape) == 1 and "head" in key})]
    for variant in sorted(variants, key=lambda v: (v != name, modules[v] != family)):
        try:
            bare = _shapes_of(variant, 0)
        except (RuntimeError, ValueError):  # a model that is nothing without classes
            continue
        if not shapes.items() >= bare.items():
            continue
        for count in counts:
            if _shapes_of(variant, count) == shapes:
                return f"{variant!r} with num_classes={count}"
    return None


def _shapes_of(variant: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(timm.create_model(variant, num_classes=num_classes).state_dict())
