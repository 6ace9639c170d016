"""Reads a training config and rejects misspelt keys, before anything is built or written."""

import ast
import copy
import dataclasses
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmengine.registry
import timm
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from mmpretrain.registry import MODELS
from timm.models import PretrainedCfg
from torch import nn
from torch.utils.data import DataLoader

from linzoo.backbones.layers.without_memory import without_memory

from ..configs import shipped_configs
from .dense import DENSE
from .errors import InputError, did_you_mean, existing_file, note
from .resume import latest_checkpoint, refuse_what_cannot_be_resumed
from .runner import Runner
from .task import Task, TimmModel, without_start
from .weights import fit, read_checkpoint, weights_file


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


# Keys that mmengine reads from the config itself, besides the arguments of its Runner.
TOP_LEVEL = _parameters(Runner.__init__) - {"cfg"} | {
    "activation_checkpointing",
    "commercial",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
}
_LOADER = _parameters(DataLoader.__init__) | {"num_batch_per_epoch"}
ANY = "**"
# Dictionaries without their own `type`.
SECTIONS = {
    "train_dataloader": _LOADER,
    "val_dataloader": _LOADER,
    "test_dataloader": _LOADER,
    "train_cfg": _parameters(EpochBasedTrainLoop) | {"by_epoch"},
    "val_cfg": _parameters(ValLoop),
    "test_cfg": _parameters(TestLoop),
    "log_processor": _parameters(LogProcessor),
    "randomness": _parameters(Runner.set_randomness),
    "model.teacher": _parameters(timm.create_model) | {ANY},
    "model.init_from": _parameters(timm.create_model) | {ANY},
    **{
        f"model{part}.pretrained_cfg_overlay": {field.name for field in dataclasses.fields(PretrainedCfg)}
        for part in ("", ".teacher", ".init_from")
    },
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
}


def is_config(model: str) -> bool:
    """Whether the MODEL of a command is one of our configs, a file or a shipped one, and not a model's name."""
    return model.endswith(".py") or model.removeprefix("configs/") in shipped_configs()


def find_config(path: str) -> str:
    """The file of a config: `path` if it exists, else the shipped config of that name, such as
    ``cls/groupmamba_t_digits``.

    Raises InputError if there is neither.
    """
    if Path(path).exists():
        return path
    name, known = path.removesuffix(".py").removeprefix("configs/"), shipped_configs()
    if name in known:
        return str(known[name])
    if "/" not in name and len(same := [key for key in known if key.endswith(f"/{name}")]) == 1:
        return str(known[same[0]])
    raise InputError(
        f"config {path!r}: no such file, and no shipped config{did_you_mean(name, known)}; `linzoo configs` lists those"
    )


def load_config(path: str, options: dict | None = None) -> Config:
    """The config in a file, or the shipped one of that name, with `--cfg-options` applied and every key checked.

    Raises InputError for a file that is missing or not a config, a misspelt key at any depth, an unknown `type` or timm
    model; the message suggests what was probably meant.
    """
    path = find_config(path)
    if existing_file("config", path).suffix != ".py":
        raise InputError(f"config {path!r}: expected a Python file (.py)")
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as e:
        raise InputError(
            f"config {path!r} cannot be read: {e}; if it detects objects, `pip install 'linzoo[det]'` installs the rest"
        ) from e
    except Exception as e:  # the config is Python: it may raise anything
        message = (str(e).strip().splitlines() or [""])[-1]
        raise InputError(f"config {path!r} cannot be read: {type(e).__name__}: {message}") from e
    if cfg.get("default_scope") == "mmdet":
        importlib.import_module(f"{__package__}.detection")
    for option, value in (options or {}).items():
        _check_option(cfg, option)
        cfg.merge_from_dict({option: value})
    _check_top_level(cfg, path)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        for key, value in cfg.items():
            if key in TOP_LEVEL:
                _check(value, key, cfg.get("default_scope"))
        model = cfg.get("model", {})
        if isinstance(model.get("backbone"), dict) and model.backbone.get("type") == "LinZooBackbone":
            _check_name(str(model.backbone.get("model_name")), "model.backbone")
            _build_without_memory(without_start(model.backbone), "model.backbone")
        _check_model(model)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        _read_by_ours(cfg.get(loader), cfg.get("default_scope"))
    return cfg


def task_of(cfg: Config) -> type[Task]:
    """The task of a config's model: the model's class, or the task for OpenMMLab's models around a backbone.

    Raises:
        InputError: the model is neither.
    """
    model, scope = cfg.get("model", {}), cfg.get("default_scope")
    kind = model.get("type") if inspect.isclass(model.get("type")) else MODELS.get(str(model.get("type")))
    if inspect.isclass(kind) and issubclass(kind, Task):
        return kind
    if "backbone" in model and scope in DENSE:
        return DENSE[scope]
    raise InputError(
        f"config key model.type={model.get('type')!r}: expected a model of linzoo.tools.engine, or one with a backbone "
        f"and default_scope one of {', '.join(DENSE)}"
    )


def _read_by_ours(node: Any, scope: str | None) -> None:
    """Replaces OpenMMLab's default loaders by `LoadImage` and `LoadLabelMap`, so that check and run agree."""
    if isinstance(node, (list, tuple)):
        for item in node:
            _read_by_ours(item, scope)
    elif isinstance(node, dict):
        kind = str(node.get("type")).rpartition(".")[2]
        if kind == "LoadImageFromFile" and node.keys() <= {"type", "to_float32"}:
            node["type"] = "mmengine.LoadImage"
        elif kind == "LoadAnnotations" and scope == "mmseg" and node.keys() <= {"type", "reduce_zero_label"}:
            node["type"] = "mmengine.LoadLabelMap"
        for item in node.values():
            _read_by_ours(item, scope)


def _check_option(cfg: Config, option: str) -> None:
    """An option may change existing values, or add an argument to a dictionary whose keys are checked afterwards."""
    node, path = cfg._cfg_dict, ""
    for key in option.split("."):
        if isinstance(node, (list, tuple)) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, dict) and ("type" in node or path in SECTIONS or (not path and key in TOP_LEVEL)):
            return
        else:
            known = list(node) if isinstance(node, dict) else []
            raise InputError(f"--cfg-options {option}: the config has no {key!r}{did_you_mean(key, known)}")
        path = f"{path}.{key}" if path else key


def _check_top_level(cfg: Config, path: str) -> None:
    """Top-level names must be mmengine's, or be used by the config's files; then they are dropped, as they have served.

    A run writes its config, where nothing would use them.
    """
    used, files, seen = set(), [Path(path)], set()
    while files:
        file = files.pop()
        if file in seen:
            continue
        seen.add(file)
        tree = ast.parse(file.read_text())
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        files += [Path(Config._get_cfg_path(base, str(file))[0]) for base in Config._get_base_files(str(file))]
    for key in [key for key in cfg if key not in TOP_LEVEL]:
        if key not in used:
            raise InputError(f"config {path!r}: unknown key {key!r}{did_you_mean(key, TOP_LEVEL)}")
        cfg.pop(key)


def _check(node: Any, path: str, scope: str | None) -> None:
    """Every dictionary with a `type` must name something registered and give it arguments that it takes."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            _check(item, f"{path}.{i}", scope)
    if not isinstance(node, dict):
        return
    known = SECTIONS.get(path)
    if isinstance(node.get("type"), str):
        known = _arguments(_resolve(node["type"], path, scope))
    elif inspect.isclass(node.get("type")):
        known = _arguments(node["type"])
    for key, value in node.items():
        if known is not None and key not in known | {"type", "_scope_", "priority"}:
            hint = did_you_mean(key, known - {ANY}, 0.85 if ANY in known else 0.6)
            if hint or ANY not in known:
                raise InputError(f"config key {path}.{key}={value!r}: unknown{hint}")
        _check(value, f"{path}.{key}", scope)


def _resolve(name: str, path: str, scope: str | None) -> Callable:
    modules = [mmengine.registry] + ([importlib.import_module(f"{scope}.registry")] if scope else [])
    registries = [x for module in modules for x in vars(module).values() if isinstance(x, Registry)]
    for registry in reversed(registries):
        if found := registry.get(name):
            return found
    if operator := getattr(sys.modules.get("mmcv.ops"), name, None):  # mmdet's configs use some as types
        return operator
    names = {key for registry in registries for key in registry.module_dict}
    raise InputError(f"config key {path}.type={name!r}: nothing is registered under it{did_you_mean(name, names)}")


def _arguments(of: Callable) -> set[str]:
    """Names of the arguments of a class or function, plus ANY if it takes any keyword."""
    names = set()
    for owner in inspect.getmro(of) if inspect.isclass(of) else (of,):
        if inspect.isclass(owner) and "__init__" not in vars(owner):
            continue
        try:
            parameters = inspect.signature(owner.__init__ if inspect.isclass(owner) else owner).parameters.values()
        except ValueError:  # written in C
            break
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            break
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return names | {ANY}


def _check_model(model: ConfigDict, start: bool = False) -> None:
    """A timm model must exist and take the keywords and files in the config. It is built without memory.

    Args:
        start: whether start files are read; published weights never are.
    """
    kind = model.get("type") if inspect.isclass(model.get("type")) else MODELS.get(str(model.get("type")))
    if not (inspect.isclass(kind) and issubclass(kind, TimmModel)):
        return
    model = copy.deepcopy(model)
    for key, settings in (
        ("model", model),
        *((f"model.{name}", model.get(name)) for name in ("teacher", "init_from", "tokenizer")),
    ):
        if not settings:
            continue
        _check_name(str(settings.get("model_name")), key)
        settings["pretrained"] = start and _file_of(settings, key)
    _build_without_memory(model, "model")


def _file_of(settings: ConfigDict, key: str) -> str | bool:
    """The file that a model starts from; False if there is none."""
    overlay = (settings.get("model_kwargs") or settings).get("pretrained_cfg_overlay")
    try:
        return weights_file(settings["model_name"], settings.get("pretrained", False), overlay) or False
    except (InputError, RuntimeError) as e:  # RuntimeError: timm has no such tag
        raise InputError(f"config key {key}.{e}") from e


def _check_name(name: str, key: str) -> None:
    base = name.partition(".")[0]
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models())
        raise InputError(f"config key {key}.model_name={name!r}: no such model in timm or LinZoo{hint}")


def _build_without_memory(settings: dict, key: str) -> nn.Module:
    try:
        with without_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied to where there is no memory
            return MODELS.build(settings)
    except FileNotFoundError as e:
        raise InputError(f"config key {key}.pretrained: {e}") from e
    except (RuntimeError, ValueError) as e:  # RuntimeError: timm has no such tag
        raise InputError(f"config key {key}: {e}") from e
    except TypeError as e:
        name = settings.get("model_name", settings.get("type"))
        raise InputError(f"config key {key}: {name!r} does not take these keywords: {e}") from e


def _without_lost_files(model: ConfigDict, resumed: Path) -> None:
    """Leaves out missing start files: a resumed run gets its weights from the checkpoint."""
    for settings in (model, model.get("backbone")):
        file = settings.get("pretrained") if isinstance(settings, dict) else None
        if isinstance(file, str) and "://" not in file and not Path(file.partition("#")[0]).exists():
            settings["pretrained"] = False
            note(f"--resume: pretrained={file!r} is gone; the weights are those of {str(resumed)!r}")


def _refuse_non_commercial(model: ConfigDict) -> None:
    """InputError if published weights with a non-commercial licence are requested; for a file, only a note."""
    for key in ("model", "model.backbone", "model.teacher", "model.init_from"):
        settings = model if key == "model" else model.get(key.removeprefix("model."))
        start = settings.get("pretrained") if isinstance(settings, dict) else None
        if not start or not settings.get("model_name"):
            continue
        name = settings["model_name"]
        licence = getattr(timm.models.get_pretrained_cfg(name), "license", None) or ""
        if "non-commercial" not in licence:
            continue
        if start is True or "://" in str(start):
            raise InputError(
                f"config key {key}.pretrained={start!r}: the weights of {name!r} have the licence {licence}; expected "
                "others where commercial=True"
            )
        note(f"commercial=True: published weights of {name!r} have the licence {licence}; is {start!r} your own?")


def check_start(cfg: Config) -> None:
    """Checks what a run starts from, before it writes anything. A resumed run may have lost its start file.

    Raises:
        InputError: a file is missing, damaged or another model's; a setting changed that a resumed run cannot follow.
    """
    resumed = latest_checkpoint(cfg.work_dir) if cfg.get("resume") else None
    if resumed:
        refuse_what_cannot_be_resumed(cfg, resumed)
        _without_lost_files(cfg.model, resumed)
    backbone = cfg.model.get("backbone")
    if cfg.get("commercial"):
        _refuse_non_commercial(cfg.model)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        if isinstance(backbone, dict) and backbone.get("type") == "LinZooBackbone":
            file = _file_of(backbone, "model.backbone")
            _build_without_memory({**backbone, "pretrained": file}, "model.backbone")
        _check_model(cfg.model, start=True)
    source = resumed or cfg.get("load_from")
    if source:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
            model = task_of(cfg).weights(_build_without_memory(without_start(cfg.model), "model"))
        fit(model, read_checkpoint(source).state, source, start=not resumed)
