"""The interface of a task for the tools: a model to train, its data and its predictions."""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models._hub import generate_readme
from torch import nn

from linzoo.backbones import kind_of, list_models
from linzoo.backbones.layers.state_tuning import tuned_states
from linzoo.backbones.model_card import hub_task, model_card

from .errors import InputError
from .files import place, whole, write_atomically
from .images import EXTENSIONS, find_files, read_rgb
from .weights import create_model

SHEET = 64
TRUTHS = ("LoadAnnotations", "LoadLabelMap", "LoadMask")  # steps that load the ground truth


@dataclass
class Job:
    """What to predict, and where to write the results.

    Attributes:
        cfg: the training config; its test pipeline prepares images.
        task: its task.
        classes: class names, if the checkpoint has them.
        inputs: files.
        folder: folder that the inputs' places are relative to.
        out: folder for results.
        options: the options of the command line.
    """

    cfg: Config
    task: "type[Task]"
    classes: list[str] | None
    inputs: list[Path]
    folder: Path
    out: Path
    options: argparse.Namespace

    def place(self, below: str, ending: str) -> list[Path]:
        """A file below `out/below` for each input."""
        return place(self.inputs, self.folder, self.out / below, ending, self.task.inputs[1])

    def batches(self, size: int = 32) -> Iterator[Any]:
        """The inputs, prepared by the config's test pipeline, in batches of images of one size."""
        steps = self.cfg.test_dataloader.dataset.pipeline
        with DefaultScope.overwrite_default_scope(self.cfg.get("default_scope")):
            pipeline = Compose([step for step in steps if step.type.rpartition(".")[2] not in TRUTHS])
        items = (_prepare(pipeline, path) for path in self.inputs)
        for _, alike in itertools.groupby(items, key=lambda item: item["inputs"].shape):
            while batch := list(itertools.islice(alike, size)):
                yield pseudo_collate(batch)


def _prepare(pipeline: Compose, path: Path) -> Any:
    try:
        return pipeline({"img_path": str(path), "img_id": 0})
    except AssertionError as e:  # Rerange, for an image with a single value
        raise InputError(f"image {str(path)!r} cannot be prepared; expected one that is not blank") from e


TASKS: "list[type[Task]]" = []


class Task:
    """How the tools treat models of one kind: where `predict` finds inputs, its results for them, how it draws them.

    For our tasks it is the model itself (see `TimmModel`). For a model of another package it is a separate class, whose
    methods get that model as `self`.

    Attributes:
        kinds: the kinds of the zoo's models, as in `list_models`, that it trains.
        inputs: what `predict` takes, and the endings of such files; no endings if it takes no files.
        read: reads such a file, or raises InputError.
        tables: whether the metrics print tables that `test` shows.
    """

    kinds: ClassVar[tuple[str, ...]] = ("backbone", "adopted")
    inputs: ClassVar[tuple[str, tuple[str, ...]]] = ("image", EXTENSIONS)
    read: ClassVar[Callable[[Path], Any]] = staticmethod(read_rgb)
    tables: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        TASKS.append(cls)

    @staticmethod
    def options(parser: argparse._ArgumentGroup) -> None:
        """Adds the options of `predict` that only this task has."""

    @classmethod
    def find(cls, path: str | None) -> list[Path]:
        """The file at `path`, or every input below the folder `path`, sorted; each is read once before any result."""
        what, endings = cls.inputs
        if not endings:
            return []
        expected = f"expected files ending in {', '.join(endings)}"
        if path is None or not Path(path).exists():
            raise InputError(f"{what} {path!r}: no such file or folder; {expected}")
        anyway = Path(path).is_file() and (endings == EXTENSIONS or path.lower().endswith(endings))  # Pillow decides
        found = [Path(path)] if anyway else find_files(path, endings)
        if not found:
            raise InputError(f"{path!r} holds no {what}; {expected}")
        for file in found:
            cls.read(file)
        return found

    def weights(self) -> Any:
        """The module whose state dict a checkpoint stores."""
        return self

    def exported(self, cfg: Config) -> nn.Module:
        """What `linzoo export` writes of this model: a function of images, with timm's `pretrained_cfg`.

        InputError if there is none.
        """
        raise InputError(
            f"model.type={type(self).__name__!r} cannot be exported; expected a model of images or volumes"
        )

    def predict_files(self, job: Job) -> list[dict[str, Any]]:
        """Predicts for every input of a job and writes the results; returns the entries of predictions.json."""
        raise InputError(f"model.type={type(self).__name__!r} predicts nothing from the command line; expected Python")

    @staticmethod
    def draw(axis: Axes, result: dict[str, Any]) -> None:
        """Draws one result of `predict_files` on a contact sheet."""
        axis.imshow(read_rgb(result.get("drawn", result["path"])))


class TimmModel(Task, BaseModel):
    """A model of timm's registry to train. The state dict has the timm model's own names.

    Args:
        model_name: timm name of a model of one of `kinds`, or from outside the zoo; other arguments go to
            `timm.create_model`.
        pretrained: True for published weights, or a file or URL of weights, from any trainer and in any layout. A
            classifier with another number of classes starts from random weights.
        data_preprocessor: settings of mmengine's preprocessor.
        grad_checkpointing: compute activations anew in the backward pass rather than keep them: less memory, more time.

    Raises:
        InputError: the model is of another kind, or keeps its activations; the weights are missing or another model's.
    """

    needs: ClassVar[str] = "forward"  # a method that identifies models of this task
    example: ClassVar[str | None] = None  # such a model, if the first of its kind is not one

    def __init__(
        self,
        model_name: str,
        *args,
        pretrained: bool | str = False,
        data_preprocessor: dict | None = None,
        grad_checkpointing: bool = False,
        **kwargs,
    ):
        super().__init__(data_preprocessor)
        kind, example = kind_of(model_name), self.example or list_models(kind=self.kinds[0])[0]
        expected = f"expected a model of kind {' or '.join(self.kinds)}, such as {example!r}"
        if kind is not None and kind not in self.kinds:
            raise InputError(f"model_name={model_name!r} is of kind {kind!r}; {expected}")
        self.model = create_model(model_name, *args, pretrained=pretrained, **kwargs)
        if not hasattr(self.model, self.needs):
            raise InputError(f"model_name={model_name!r} has no {self.needs}(); {expected}")
        if grad_checkpointing:
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise InputError(f"grad_checkpointing=True: expected a model that has it, got {model_name!r}")
            self.model.set_grad_checkpointing()
        self._register_state_dict_hook(_remove_prefix)
        self._register_load_state_dict_pre_hook(_add_prefix)

    def init_weights(self) -> None:
        """Does nothing: timm initialises or loads in `create_model`, and doing it again would undo a loading."""

    def weights(self) -> nn.Module:
        """The timm model."""
        return self.model

    def exported(self, cfg: Config) -> nn.Module:
        """The timm model."""
        return self.model

    def data_config(self, dataset: Any, pipeline: list[dict]) -> dict[str, Any] | None:
        """timm's settings for how `pipeline` and preprocessor prepare the images of `dataset`; None without images."""
        first = next(iter(dataset)) if isinstance(dataset, torch.utils.data.IterableDataset) else dataset[0]
        size = tuple(first["inputs"].shape)
        if len(size) != 3:
            return None
        if not hasattr(self.data_preprocessor, "mean"):
            return {"input_size": size, "mean": (0.0,) * size[0], "std": (1.0,) * size[0], "crop_pct": 1.0}
        edge = next((step.scale for step in pipeline if step.type == "ResizeEdge"), size[-1])
        mean, std = ((x.flatten() / 255).tolist() for x in (self.data_preprocessor.mean, self.data_preprocessor.std))
        return {"input_size": size, "mean": mean, "std": std, "crop_pct": size[-1] / edge}

    def export(self, folder: Path, data_config: dict | None, **facts) -> None:
        """Writes `folder/model.safetensors`, `folder/config.json`, timm's exchange format, and the Hub's `README.md`.

        Each file is complete or absent. transformers also loads them if the model is registered.

        Args:
            data_config: timm's preprocessing keys (input_size, mean, std ...). None for a model without images, which
                timm has no keys for: then only the weights are written.
            facts: further entries of config.json; numbers are metrics.

        If states were tuned, `folder/states.safetensors` has only the trained values.
        """
        with whole(folder) as partial:
            if data_config is None:
                partial.mkdir()
                save_file(self.model.state_dict(), partial / "model.safetensors")
            else:
                settings = dict(model_config=facts, data_config=data_config, safe_serialization=True)
                save_for_hf(self.model, str(partial), **settings)
                config = json.loads((partial / "config.json").read_text())
                config.get("model_args", {}).pop("num_classes", None)  # stored twice; transformers takes only one
                (partial / "config.json").write_text(json.dumps(config, indent=2))
                name = config["architecture"]
                metrics = {key: value for key, value in facts.items() if isinstance(value, (int, float))}
                readme = generate_readme(model_card(name, metrics), name, hub_task(name))
                (partial / "README.md").write_text(readme, encoding="utf-8")
            if states := tuned_states(self.model):
                save_file(states, partial / "states.safetensors")
            folder.mkdir(exist_ok=True)
            for file in partial.iterdir():
                file.replace(folder / file.name)
            partial.rmdir()


# mmpretrain's versions of these two only work for a classifier at the root. Within an EMA copy the first has no effect,
# and the second drops keys outside `prefix` (the step count).
def _remove_prefix(module, state_dict, prefix, local_metadata):
    for key in [k for k in state_dict if k.startswith(f"{prefix}model.")]:
        state_dict[prefix + key.removeprefix(f"{prefix}model.")] = state_dict.pop(key)


def _add_prefix(state_dict, prefix, *_):
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def draw_sheet(results: list[dict], file: Path, draw: Callable[[Axes, dict], None]) -> None:
    """Draws a contact sheet of up to 64 results; `draw(axis, result)` draws one."""
    shown = results[:: -(-len(results) // SHEET)]
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, result in zip(axes, shown, strict=False):
        draw(axis, result)
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=100))


def without_start(model: dict) -> dict:
    """The settings of a model that will load a checkpoint: without start weights or a teacher."""
    off = {"pretrained": False, "distillation": "none", "init_from": None}
    if isinstance(model.get("backbone"), dict):
        model = {**model, "backbone": without_start(model["backbone"])}
    return {**model, **{key: off[key] for key in off.keys() & model.keys()}}


def build(cfg: Config) -> nn.Module:
    """The model of a training config, without loading start weights or a teacher."""
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
        return MODELS.build({"data_preprocessor": cfg.get("data_preprocessor"), **without_start(cfg.model)})
