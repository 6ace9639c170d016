"""Reading a training config and refusing what it misspells, before anything is built or written."""

import ast
import copy
import importlib
import inspect
import sys
import warnings
from pathlib import Path

import mmengine.registry
import timm
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from mmpretrain.registry import MODELS
from torch.utils.data import DataLoader

from .errors import InputError, did_you_mean, existing_file
from .runner import Runner


def _parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


# Keys that mmengine reads from the config itself, beside the arguments of its Runner.
TOP_LEVEL = _parameters(Runner.__init__) - {"cfg"} | {
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
}
_LOADER = _parameters(DataLoader.__init__) | {"num_batch_per_epoch"}
ANY = "**"
# The kinds of `model` that are made by `timm.create_model(model_name, ...)`.
TIMM_MODELS = ("Classifier", "NextFrame", "PromptSegmenter", "Restorer", "SceneCompleter", "Segmenter")
# Dictionaries without a `type` of their own.
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
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
}


def load_config(path: str, options: dict | None = None) -> Config:
    """The config of a file with `--cfg-options` applied, every key of it checked.

    Raises InputError for a file that is missing or no config, a misspelt key at any depth, an unknown `type` or timm
    model; the message says what was probably meant.
    """
    if existing_file("config", path).suffix != ".py":
        raise InputError(f"config {path!r}: expected a Python file (.py)")
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as e:
        raise InputError(
            f"config {path!r} cannot be read: {e}; if it detects objects, `pip install 'linzoo[det]'` installs the rest"
        ) from e
    except Exception as e:  # the config is Python: anything may be wrong with it
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
        _check_model(cfg.get("model", {}))
    return cfg


def without_start(model: dict) -> dict:
    """The settings of a model that is to load a checkpoint: with nothing to start or learn from."""
    off = {"pretrained": False, "distillation": "none", "init_from": None}
    if isinstance(model.get("backbone"), dict):
        model = {**model, "backbone": without_start(model["backbone"])}
    return {**model, **{key: off[key] for key in off.keys() & model.keys()}}


def _check_option(cfg: Config, option: str) -> None:
    """An option may change what is there, or add an argument to a dictionary whose keys are checked afterwards."""
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
    """Top-level names must be mmengine's, or be used by the files that make up the config."""
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
    for key in cfg:
        if key not in TOP_LEVEL and key not in used:
            raise InputError(f"config {path!r}: unknown key {key!r}{did_you_mean(key, TOP_LEVEL)}")


def _check(node, path: str, scope: str | None) -> None:
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


def _resolve(name: str, path: str, scope: str | None):
    modules = [mmengine.registry] + ([importlib.import_module(f"{scope}.registry")] if scope else [])
    registries = [x for module in modules for x in vars(module).values() if isinstance(x, Registry)]
    for registry in reversed(registries):
        if found := registry.get(name):
            return found
    if operator := getattr(sys.modules.get("mmcv.ops"), name, None):  # mmdet's configs name some as types
        return operator
    names = {key for registry in registries for key in registry.module_dict}
    raise InputError(f"config key {path}.type={name!r}: nothing is registered under it{did_you_mean(name, names)}")


def _arguments(of) -> set[str]:
    """Names of the arguments of a class or function, with ANY among them where it takes any keyword."""
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


def _check_model(model: ConfigDict) -> None:
    """A timm model must exist and take the keywords that the config gives it: it is built without memory."""
    if isinstance(model.get("backbone"), dict) and model.backbone.get("type") == "LinZooBackbone":
        _check_backbone(model.backbone)
    if model.get("type") not in TIMM_MODELS:
        return
    model = copy.deepcopy(model)
    for key, settings in (("model", model), *((f"model.{name}", model.get(name)) for name in ("teacher", "init_from"))):
        if not settings:
            continue
        settings["pretrained"] = False
        name = str(settings.get("model_name"))
        base = name.split(".")[0]
        if not timm.is_model(base):
            raise InputError(
                f"config key {key}.model_name={name!r}: no such model in timm or LinZoo"
                f"{did_you_mean(base, timm.list_models())}"
            )
    try:
        with torch.device("meta"):
            MODELS.build(model)
    except TypeError as e:
        raise InputError(f"config key model: {model.model_name!r} does not take these keywords: {e}") from e


def _check_backbone(backbone: ConfigDict) -> None:
    """A backbone must exist, take its keywords, and have the levels asked for: it is built without memory."""
    name = str(backbone.get("model_name")).partition(".")[0]
    if not timm.is_model(name):
        raise InputError(
            f"config key model.backbone.model_name={name!r}: no such model in timm or LinZoo"
            f"{did_you_mean(name, timm.list_models())}"
        )
    _build_backbone(without_start(backbone))


def check_start(cfg: Config) -> None:
    """InputError where the file that a backbone is to start from is missing or another model's."""
    backbone = cfg.model.get("backbone", {})
    start = backbone.get("pretrained", False)
    if isinstance(start, str) and not start.startswith("http"):
        existing_file("config key model.backbone.pretrained", start)
        _build_backbone(backbone)


def _build_backbone(settings: dict) -> None:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied to where there is no memory
            MODELS.build(settings)
    except (TypeError, ValueError) as e:
        raise InputError(f"config key model.backbone: {e}") from e
