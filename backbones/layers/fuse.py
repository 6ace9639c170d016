"""Folding for inference."""

import copy
from itertools import pairwise

from timm.layers import BatchNormAct2d
from timm.models import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_for_inference(model):
    """A faster copy of `model` in eval mode with fewer, equivalent layers: the same outputs up to rounding.

    Modules with an inference form switch to it (a method `fuse`, `reparameterize` or `switch_to_deploy`, as timm's
    `reparameterize_model` calls them): Spatial-Mamba's state fusion, Omni-Shift, EfficientViM's gated branches. Then
    every BatchNorm is folded into the convolution registered right before it in the same module.

    Args:
        model: Any `nn.Module`, left unchanged. If its weights change, make a new copy.
    """
    model = reparameterize_model(copy.deepcopy(model).eval(), inplace=True)
    for module in list(model.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if conv.out_channels == norm.num_features and norm.track_running_stats:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    return model
