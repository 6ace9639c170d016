"""Optimizer wrappers and parameter groups."""

import contextlib

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.optim import param_groups_weight_decay


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast, on CPU and CUDA alike; bfloat16 needs no loss scaling."""

    @contextlib.contextmanager
    def optim_context(self, model):
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmWeightDecay(DefaultOptimWrapperConstructor):
    """timm's two parameter groups, and one for each kind of parameter whose module asks for other settings.

    No decay for tensors of rank 0 and 1, biases and the model's `no_weight_decay()`. A module's `optim_hints`,
    ``{name of its parameter: {"lr": ..., "weight_decay": ...}}``, say at most which learning rate (the config's where
    that is lower) and exactly which decay a parameter gets: the state matrices of S4 and S5 need both.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"bypass_duplicate": True})

    def add_params(self, params, module, prefix="", is_dcn_module=None):
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


def _decay(hint: dict) -> dict:
    return {"weight_decay": hint["weight_decay"]} if "weight_decay" in hint else {}
