"""Scales, rotates and permutes the channels of an `Axis` in place; the model's outputs stay the same.

Matrices are float64, and are cast when they meet a weight. Every function raises ValueError for a transform that the
axis does not allow; the model is then unchanged.
"""

import torch
from torch import Tensor, nn

from .invariances import Axis

__all__ = ["Online", "fold_gains", "online_matrices", "permute", "remove_online", "rotate", "scale"]


class Online:
    """A hook that multiplies the input of a linear map by `matrix` ``(n, n)``, or by the vector of its diagonal."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        matrix = self.matrix.to(x)
        return (x * matrix if matrix.dim() == 1 else x @ matrix, *rest)


def _check(axis: Axis, move: str) -> None:
    if move not in axis.moves:
        raise ValueError(f"axis: expected one that allows {move!r}, got {axis.name!r}: {', '.join(sorted(axis.moves))}")


def _slots(model: nn.Module, axis: Axis):
    """Each slot with a view of the channels' part of its parameter."""
    for slot in axis.slots:
        yield slot, model.get_parameter(slot.name).narrow(slot.dim, slot.start, axis.size)


def _broadcast(x: Tensor, axis: Axis, dim: int, ndim: int) -> Tensor:
    """A vector of the channels, or one per group, along axis `dim` of a tensor."""
    shape = [1] * ndim
    shape[dim] = axis.size
    if axis.grouped:
        shape[0] = x.shape[0]
    return x.view(shape)


@torch.no_grad()
def scale(model: nn.Module, axis: Axis, s: Tensor) -> None:
    """Divide the weights that write the channels by `s` and multiply those that read them.

    Args:
        s: Positive, ``(n,)``, or ``(G, n)`` if the axis is grouped.
    """
    _check(axis, "scale")
    groups = [model.get_parameter(axis.slots[0].name).shape[0]] if axis.grouped else []
    if list(s.shape) != [*groups, axis.size]:
        raise ValueError(f"s: expected the shape {(*groups, axis.size)} for {axis.name!r}, got {tuple(s.shape)}")
    if not bool(((s > 0) & s.isfinite()).all()):
        raise ValueError(f"s: expected positive numbers for {axis.name!r}, got {float(s.min()):g} among them")
    s = s.double()
    for slot, part in _slots(model, axis):
        if slot.power:
            part.mul_(_broadcast(s**slot.power, axis, slot.dim, part.dim()).to(part))
    if axis.online:
        model.get_submodule(axis.online).register_forward_pre_hook(Online(1 / s))


@torch.no_grad()
def fold_gains(model: nn.Module, axis: Axis) -> None:
    """Move the gains of the norms that read the channels into the linear maps after them; the gains become 1."""
    for norm, reader in axis.norms:
        gain = model.get_submodule(norm).weight
        model.get_submodule(reader).weight.mul_(gain)
        gain.fill_(1)


@torch.no_grad()
def rotate(model: nn.Module, axis: Axis, R: Tensor) -> None:
    """Rotate the channels, ``x R``: the weights that write them and those that read them.

    Args:
        R: Orthogonal, ``(n, n)``, or ``(G, n, n)`` if the axis is grouped. With heads it is block-diagonal.
    """
    _check(axis, "rotate")
    groups = [model.get_parameter(axis.slots[0].name).shape[0]] if axis.grouped else []
    if list(R.shape) != [*groups, axis.size, axis.size]:
        shape = (*groups, axis.size, axis.size)
        raise ValueError(f"R: expected the shape {shape} for {axis.name!r}, got {tuple(R.shape)}")
    R = R.double()
    if not torch.allclose(R @ R.mT, torch.eye(axis.size, dtype=R.dtype, device=R.device), atol=1e-8):
        raise ValueError(f"R: expected an orthogonal matrix for {axis.name!r}, got one with R R^T off the identity")
    width = axis.size // axis.blocks
    if axis.blocks > 1 and bool((R * (1 - torch.block_diag(*[torch.ones(width, width)] * axis.blocks).to(R))).any()):
        raise ValueError(f"R: expected blocks of {width} for {axis.name!r}, got a matrix that mixes them")
    fold_gains(model, axis)
    for slot, part in _slots(model, axis):
        rows = part.double().movedim(slot.dim, -1)
        flat = rows.flatten(1, -2) if axis.grouped else rows  # (G, ..., n), each with its group's matrix
        part.copy_((flat @ R.to(rows)).view(rows.shape).movedim(-1, slot.dim))
    if axis.online:
        model.get_submodule(axis.online).register_forward_pre_hook(Online(R))


@torch.no_grad()
def permute(model: nn.Module, axis: Axis, order: Tensor) -> None:
    """Put channel ``order[i]`` at place i.

    Args:
        order: A permutation ``(n,)`` of integers; channels stay in their heads. Groups share it.
    """
    _check(axis, "permute")
    if not torch.equal(order.sort().values, torch.arange(axis.size, device=order.device)):
        raise ValueError(f"order: expected a permutation of {axis.size} channels for {axis.name!r}")
    width = axis.size // axis.blocks
    if not torch.equal(order // width, torch.arange(axis.size, device=order.device) // width):
        raise ValueError(f"order: expected channels of {axis.name!r} to stay in their heads of {width}")
    fold_gains(model, axis)
    for slot, part in _slots(model, axis):
        part.copy_(part.index_select(slot.dim, order.to(part.device)))


def online_matrices(model: nn.Module) -> dict[str, list[Tensor]]:
    """The matrices of `Online` hooks by module name, in the order in which they multiply."""
    hooks = {
        name: [hook.matrix for hook in module._forward_pre_hooks.values() if isinstance(hook, Online)]
        for name, module in model.named_modules()
    }
    return {name: matrices for name, matrices in hooks.items() if matrices}


@torch.no_grad()
def remove_online(model: nn.Module) -> None:
    """Undo in the weights what hooks do to inputs, and remove the hooks: an ordinary model again."""
    for module in model.modules():
        hooks = [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Online)]
        for key, hook in reversed(hooks):
            matrix = hook.matrix.to(module.weight.device)
            weight = module.weight.double()
            module.weight.copy_(weight * matrix if matrix.dim() == 1 else weight @ matrix.mT)
            del module._forward_pre_hooks[key]
