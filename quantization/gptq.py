"""GPTQ (arXiv 2210.17323): rounds the columns of a weight in turn, and the columns left make up for each error.

torchao's `prototype.gptq` is not used: it makes packed int4 tensors with zero points, on CUDA, and takes neither groups
of linear maps nor the symmetric groups of Quamba2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linzoo.backbones.layers import S6, GroupedLinear

from .fake import Quantizer
from .observers import ChannelObserver
from .taps import layers, tapped

__all__ = ["gptq", "second_moments"]

BLOCK = 128  # columns that are rounded before the others hear of their errors; it changes only the speed


@torch.no_grad()
def gptq(weight: Tensor, moments: Tensor, quantizer: Quantizer, damping: float = 0.01) -> Tensor:
    """A weight on the quantiser's grid that keeps the outputs ``x W^T`` of its inputs x (algorithm 1 of the paper)::

        H = E[x^T x] + damping mean(diag E[x^T x]) I;    H^-1 = U^T U, U upper triangular
        for j = 1 ... n:    e = (w_j - round(w_j)) / U_jj;    w_k -= e U_jk for all k > j

    Ranges are those of the rows of `weight`, or those of each group when its turn comes. A channel that was always 0
    rounds to nearest, and makes up for nothing.

    Args:
        weight: ``(O, n)``, or ``(G, O, n)``: one map after another.
        moments: ``E[x^T x]`` ``(n, n)``, or ``(G, n, n)``.
        quantizer: Of granularity 'channel' over the rows, or 'group'.

    Returns:
        In the shape and dtype of `weight`; computed in float64.

    Raises:
        ValueError: `moments` has another shape.
    """
    n = weight.shape[-1]
    if moments.shape[-2:] != (n, n):
        raise ValueError(f"moments: expected the shape {(n, n)} or (G, {n}, {n}), got {tuple(moments.shape)}")
    if weight.dim() == 3:
        moments = moments.expand(len(weight), n, n)
        return torch.stack([gptq(*pair, quantizer, damping) for pair in zip(weight, moments, strict=True)])
    W, H = weight.double().clone(), moments.double().to(weight.device, copy=True)
    diagonal = H.diagonal()
    level = diagonal.mean()
    diagonal[diagonal == 0] = 1
    diagonal += damping * level
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    grouped = quantizer.granularity == "group"
    size, rows = quantizer.group if grouped else BLOCK, W.aminmax(dim=1, keepdim=True)
    for start in range(0, n, size):
        end = min(start + size, n)
        block = W[:, start:end]
        low, high = block.aminmax(dim=1, keepdim=True) if grouped else rows
        errors = torch.zeros_like(block)
        for j in range(end - start):
            column, steps = block[:, j : j + 1], U[start + j, start + j : end]
            rounded = quantizer(column, (low, high))
            errors[:, j : j + 1] = (column - rounded) / steps[0]
            block[:, j + 1 :] -= errors[:, j : j + 1] * steps[1:]
            column.copy_(rounded)
        W[:, end:] -= errors @ U[start:end, end:]
    return W.to(weight.dtype)


@torch.no_grad()
def second_moments(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """``E[x^T x]`` of the inputs of linear maps, by tap: ``(n, n)``, or ``(G, n, n)`` if the groups read their own.

    Convolutions are left out, and maps that no image reaches.

    Args:
        model: In eval mode.
        images: Batches ``(B, C, H, W)``.
    """
    maps, seen = {name: m for name, m in layers(model).items() if isinstance(m, nn.Linear | GroupedLinear | S6)}, {}

    def see(name: str, x: Tensor) -> Tensor:
        if name in maps or name.endswith(".step"):
            module = maps.get(name)
            groups = not isinstance(module, nn.Linear) and not (isinstance(module, S6) and x.dim() == 3)
            seen.setdefault(name, ChannelObserver(groups, covariance=True)).see(x)
        return x

    with tapped(model, see):
        for batch in images:
            model(batch)
    return {name: observer.second_moments() for name, observer in seen.items()}
