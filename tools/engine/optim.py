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
    """timm's two parameter groups: no decay for tensors of rank 0 and 1, biases and the model's `no_weight_decay()`."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"bypass_duplicate": True})

    def add_params(self, params, module, prefix="", is_dcn_module=None):
        model = module.model
        undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        params.extend(param_groups_weight_decay(model, self.base_wd, no_weight_decay_list=undecayed))
