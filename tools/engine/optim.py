"""Optimizer wrappers and parameter groups."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner import Runner
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

from .errors import InputError


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Runs forward passes under bfloat16 autocast, on CPU and CUDA alike; bfloat16 needs no loss scaling."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmWeightDecay(DefaultOptimWrapperConstructor):
    """timm's two parameter groups, and one for each kind of parameter whose module requests other settings.

    No decay for tensors of rank 0 and 1, biases and the model's `no_weight_decay()`. A module's `optim_hints`,
    ``{name of its parameter: {"lr": ..., "weight_decay": ...}}``, set a maximum learning rate (the config's applies if
    it is lower) and an exact decay: the state matrices of S4 and S5 need both.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"bypass_duplicate": True})

    def add_params(self, params: list, module: nn.Module, prefix: str = "", is_dcn_module: Any = None) -> None:
        model = module.model
        undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        hinted = {}  # (learning rate, decay): parameters
        for part in model.modules():
            for name, hint in getattr(part, "optim_hints", {}).items():
                parameter = getattr(part, name)
                if parameter.requires_grad:
                    settings = {"lr": min(hint.get("lr", self.base_lr), self.base_lr), **_decay(hint)}
                    hinted.setdefault(tuple(settings.items()), []).append(parameter)
        taken = {id(parameter) for group in hinted.values() for parameter in group}
        for group in param_groups_weight_decay(model, self.base_wd, no_weight_decay_list=undecayed):
            rest = [parameter for parameter in group["params"] if id(parameter) not in taken]
            params.extend([{**group, "params": rest}] if rest else [])
        params.extend({"params": group, **dict(settings)} for settings, group in hinted.items())


@OPTIMIZERS.register_module()
class Kar3(torch.optim.Optimizer):
    """Steps by signs (HyperZ.Z.W, arXiv 2401.17948): ``p -= lr (sign g + sign m_1 + sign m_2)``, with the gradient g.

    The averages ``m_i = beta_i m_i + (1 - beta_i) g`` start from 0 and are updated after the step.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the two averages.

    Raises:
        InputError: a beta is outside [0, 1), or a rate is negative.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.5, 0.95)):
        if lr < 0 or not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"lr={lr}, betas={betas}; expected a rate of 0 at least, betas from 0 to below 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the result of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                averages = state.setdefault("averages", [torch.zeros_like(parameter) for _ in group["betas"]])
                parameter.sub_(group["lr"] * (gradient.sign() + sum(m.sign() for m in averages)))
                for average, beta in zip(averages, group["betas"], strict=True):
                    average.lerp_(gradient, 1 - beta)
        return loss


# Last parts of the names of state spaces' and RWKV's own parameters: states' decay rates, steps and skips.
UNDECAYED = {"A", "A_log", "A_imag", "D", "Lambda_re", "Lambda_im", "decay", "dt_bias", "log_dt", "log_step"}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecay(DefaultOptimWrapperConstructor):
    """Learning rates that fall from the heads to the stem of a `LinZooBackbone`, as in BEiT (arXiv 2106.08254).

    ``lr(layer) = lr backbone_lr_mult layer_decay^(n + 1 - layer)`` for the n + 1 layers 0 (stem) to n of the model's
    `group_matcher`. Parameters outside the backbone's model learn at ``lr``. No weight decay for norms, biases and
    other tensors of rank 0 and 1, the model's `no_weight_decay()`, and `A`, `D`, step and decay parameters of any rank.

    Args:
        paramwise_cfg: ``dict(layer_decay=1.0, backbone_lr_mult=1.0)``; 1 and 1 for one rate everywhere.

    Raises:
        InputError: `layer_decay` is not in (0, 1], `backbone_lr_mult` not positive, or there are other keys.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, {"bypass_duplicate": True})
        settings = dict(paramwise_cfg or {})
        self.layer_decay = settings.pop("layer_decay", 1.0)
        self.backbone_lr_mult = settings.pop("backbone_lr_mult", 1.0)
        if settings or not 0 < self.layer_decay <= 1 or not self.backbone_lr_mult > 0:
            raise InputError(
                f"paramwise_cfg={dict(paramwise_cfg)}: expected layer_decay in (0, 1] and backbone_lr_mult > 0 alone"
            )

    def add_params(self, params: list, module: nn.Module, prefix: str = "", is_dcn_module: Any = None) -> None:
        scales, undecayed = {}, set()  # by parameter name
        for name, part in module.named_modules():
            if hasattr(part, "group_matcher") and not any(key.startswith(f"{name}.") for key in scales):
                layers = group_parameters(part, part.group_matcher(coarse=False), reverse=True)
                top = max(layers.values()) + 1
                for key, layer in layers.items():
                    scales[f"{name}.{key}"] = self.backbone_lr_mult * self.layer_decay ** (top - layer)
                undecayed |= {f"{name}.{key}" for key in getattr(part, "no_weight_decay", set)()}
            if "Norm" in type(part).__name__:
                undecayed |= {f"{name}.{key}" for key, _ in part.named_parameters(recurse=False)}
        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            exempt = name in undecayed or parameter.ndim < 2 or name.rpartition(".")[2] in {"bias", *UNDECAYED}
            settings = (self.base_lr * scales.get(name, 1.0), 0.0 if exempt else self.base_wd)
            groups.setdefault(settings, []).append(parameter)
        params.extend({"params": group, "lr": lr, "weight_decay": wd} for (lr, wd), group in groups.items())


@HOOKS.register_module()
class FreezeHook(Hook):
    """Trains only a classifier's head: the rest gets no gradient and stays in eval mode."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Freezes everything except the modules that the model's `pretrained_cfg` names as its classifier.

        Done at every step, because mmengine puts the whole model in training mode after `before_train_epoch`.
        """
        model = (runner.model.module if is_model_wrapper(runner.model) else runner.model).model
        names = model.pretrained_cfg["classifier"]
        heads = [model.get_submodule(name) for name in ([names] if isinstance(names, str) else names)]
        model.eval().requires_grad_(False)
        for head in heads:
            head.train().requires_grad_(True)


def _decay(hint: dict) -> dict:
    return {"weight_decay": hint["weight_decay"]} if "weight_decay" in hint else {}
