"""Sorted and clustered channels, so that each cluster has a range of its own (Quamba2, arXiv 2503.22879)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linzoo.backbones.layers import NCSSD, S6

from .invariances import Axis, invariances
from .taps import tapped
from .transforms import permute

__all__ = ["clusters", "sort_channels"]


def _means(lengths: Tensor, labels: Tensor, count: int) -> Tensor:
    members = torch.nn.functional.one_hot(labels, count).to(lengths)
    return members.T @ lengths / members.sum(0).clamp(min=1).unsqueeze(1)


def _columns(x: Tensor, count: int) -> Tensor:
    """k-means of sorted columns ``(P, n)``, started at every P/count-th: non-decreasing labels ``(P,)``."""
    count = min(count, len(x))
    centres = x[torch.arange(count) * len(x) // count]
    labels = torch.zeros(len(x), dtype=torch.long)
    for _ in range(100):
        found = torch.cdist(x, centres).argmin(1).cummax(0).values
        if torch.equal(found, labels):
            break
        labels, centres = found, _means(x, found, count)
    return labels


def _heads(x: Tensor, count: int) -> Tensor:
    """Ward's clusters of unit vectors ``(H, P)``: labels ``(H,)``."""
    if len(x) <= count:
        return torch.arange(len(x))
    from scipy.cluster.hierarchy import fcluster, ward

    unit = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.from_numpy(fcluster(ward(unit.numpy()), count, "maxclust")).long() - 1


def clusters(statistic: Tensor, blocks: int = 1, heads: int = 4, channels: int = 4) -> Tensor:
    """Which cluster each channel belongs to.

    Heads are clustered by their unit vectors (Ward). Then the channels of each cluster's heads are clustered by their
    columns (k-means, which keeps the order).

    Args:
        statistic: ``(n,)``, non-negative, rising within each head.
        blocks: Heads H, a divisor of n.
        heads, channels: Largest number of clusters of each.

    Returns:
        Integers ``(n,)``, below ``heads channels``.
    """
    rows = statistic.double().view(blocks, -1)
    groups = _heads(rows, heads)
    labels = torch.zeros(rows.shape, dtype=torch.long)
    for group in groups.unique():
        mine = groups == group
        labels[mine] = channels * group + _columns(rows[mine].T, channels)
    return labels.flatten()


def scan_axes(model: nn.Module) -> dict[str, Axis]:
    """By tap, the axes of scan inputs that a family allows to permute."""
    found = {}
    for axis in invariances(model):
        mixer, _, part = axis.name.rpartition(".")
        if part == "channels":
            module = model.get_submodule(mixer)
            scan = mixer if isinstance(module, NCSSD) else f"{mixer}.s6"
            if isinstance(dict(model.named_modules()).get(scan), NCSSD | S6):
                found[f"{scan}.x"] = axis
    return found


@torch.no_grad()
def sort_channels(model: nn.Module, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sort scan inputs, in place and within heads, by their mean size: the largest mean of any batch counts.

    Args:
        model: Its family must declare the channels of its scans.
        images: Batches ``(B, C, H, W)``.

    Returns:
        Clusters ``(n,)`` of the sorted channels, by scan tap.
    """
    axes, seen = scan_axes(model), {}

    def see(name: str, x: Tensor) -> Tensor:
        if name in axes:
            mean = x.abs().double().flatten(0, -2).mean(0).cpu()
            seen[name] = torch.maximum(mean, seen[name]) if name in seen else mean
        return x

    with tapped(model, see, scans=True):
        for batch in images:
            model(batch)
    labels = {}
    for name, statistic in seen.items():
        axis = axes[name]
        rows = statistic.view(axis.blocks, -1)
        order = rows.argsort(1) + torch.arange(axis.blocks).unsqueeze(1) * rows.shape[1]
        permute(model, axis, order.flatten())
        labels[name] = clusters(statistic[order.flatten()], axis.blocks)
    return labels
