"""One-shot pruning: single weights by magnitude or DIMAP score, or whole channels. The model keeps its shapes.

DIMAP: arXiv 2404.13648. Its score is that of LAMP (arXiv 2010.07611): the share of a layer's remaining energy that
leaves with a weight. The score makes layers comparable, so one threshold serves all layers of one kind.
"""

import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from linzoo.backbones.layers import GroupedLinear

from .invariances import Axis, invariances

__all__ = ["KINDS", "PRUNINGS", "Pruning", "dimap_scores", "prunable", "prune", "sparsity"]

Pruning = Literal["magnitude", "dimap", "channels"]
PRUNINGS: tuple[Pruning, ...] = ("magnitude", "dimap", "channels")
# DIMAP's sets of modules, by name. Modules in none (stems, norms, scans, convolutions, heads) are not pruned.
KINDS = {
    "mixers' inputs": re.compile(r"(^|\.)(in_proj|qkv|(mixer|attn)\.(key|value|receptance|gate))$"),
    "mixers' outputs": re.compile(r"(^|\.)(out_proj|(mixer|attn)\.(output|proj))$"),
    "channel mixers": re.compile(r"(^|\.)mlp\.(fc1|fc2|key|value|receptance)$"),
}
# Axes of `invariances` inside one part of a block: its inner channels. Other axes reach further, or are few.
INNER = ("channels", "beside", "hidden", "value")


def prunable(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Linear maps by kind and name; ValueError if the model has none of these names."""
    linear: dict[str, nn.Module] = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear | GroupedLinear)}
    found = {kind: {k: m for k, m in linear.items() if names.search(k)} for kind, names in KINDS.items()}
    if not any(found.values()):
        raise ValueError(f"model: expected projections of mixers or MLPs, got none in {type(model).__name__}")
    return {kind: modules for kind, modules in found.items() if modules}


def dimap_scores(weight: Tensor) -> Tensor:
    """``w^2 / sum of all v^2 with |v| >= |w|``, in the shape of `weight`; 1 for the largest weight."""
    energy, order = weight.detach().double().square().flatten().sort(descending=True)
    scores = torch.empty_like(energy)
    scores[order] = energy / energy.cumsum(0).clamp(min=torch.finfo(energy.dtype).tiny)
    return scores.view_as(weight)


def _prune_weights(model: nn.Module, ratio: float, global_scores: bool) -> list[str]:
    names = []
    for modules in prunable(model).values():
        pairs = [(module, "weight") for module in modules.values()]
        if global_scores:
            scores = {pair: dimap_scores(pair[0].weight) for pair in pairs}
            torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, importance_scores=scores, amount=ratio)
        else:
            for pair in pairs:
                torch_prune.l1_unstructured(*pair, amount=ratio)
        for pair in pairs:
            torch_prune.remove(*pair)
        names += [f"{name}.weight" for name in modules]
    return names


def _channel_scores(model: nn.Module, axis: Axis) -> Tensor:
    """Each channel's shares of energy, summed over the matrices that have it ``(n,)``."""
    scores = torch.zeros(axis.size, dtype=torch.float64)
    for slot in axis.slots:
        weight = model.get_parameter(slot.name).detach()
        if weight.dim() > 1:
            part = weight.narrow(slot.dim, slot.start, axis.size).double().square()
            energy = part.movedim(slot.dim, 0).flatten(1).sum(1).cpu()
            scores += energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    return scores


def _prune_channels(model: nn.Module, ratio: float) -> list[str]:
    axes = [a for a in invariances(model) if "permute" in a.moves and a.name.rpartition(".")[2] in INNER]
    if not axes:
        raise ValueError(f"model: expected a family that declares inner channels, got {type(model).__name__}")
    names = []
    for axis in axes:
        gone = _channel_scores(model, axis).argsort()[: round(ratio * axis.size)]
        for slot in axis.slots:
            parameter = model.get_parameter(slot.name)
            parameter.index_fill_(slot.dim, gone.to(parameter.device) + slot.start, 0)
            names.append(slot.name)
    return list(dict.fromkeys(names))


@torch.no_grad()
def prune(model: nn.Module, method: Pruning, ratio: float) -> list[str]:
    """Set weights to 0, in place.

    Args:
        model: Any model whose projections or MLPs have usual names; for 'channels' its family must declare inner
            channels.
        method: 'magnitude', the smallest weights of each layer; 'dimap', the lowest scores of each kind of layer;
            'channels', the inner channels with the least energy in each part of a block, with every weight that reads
            or writes them.
        ratio: Share of weights to prune, between 0 and 1.

    Returns:
        Names of the parameters whose zeros must stay.

    Raises:
        ValueError: unknown method, invalid ratio, or a model without such layers; the model is then unchanged.
    """
    if method not in PRUNINGS:
        raise ValueError(f"method: expected {', '.join(PRUNINGS)}, got {method!r}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: expected more than 0 and less than 1, got {ratio}")
    if method == "channels":
        return _prune_channels(model, ratio)
    return _prune_weights(model, ratio, method == "dimap")


def sparsity(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and weights for each kind of layer, for everything else, and for all."""
    found = {kind: [module.weight for module in modules.values()] for kind, modules in prunable(model).items()}
    taken = {id(weight) for weights in found.values() for weight in weights}
    found["all else"] = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    counts = {kind: (sum(int((x == 0).sum()) for x in xs), sum(x.numel() for x in xs)) for kind, xs in found.items()}
    zeros, weights = zip(*counts.values(), strict=True)
    return counts | {"all": (sum(zeros), sum(weights))}
