"""What a quantised layer reads, shown to a function: the inputs of linear maps and of depthwise convolutions.

A tap's name is its module's. An `S6` holds its linear maps as bare parameters: its own name stands for what `x_proj`
reads, ``<name>.step`` for the narrow vector r that `dt_weight` reads inside the scan.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from linzoo.backbones.layers import S6, CausalConv, GroupedLinear

from .invariances import Axis
from .observers import ChannelObserver

__all__ = ["layers", "measure", "tap", "tapped"]

Seen = Callable[[str, Tensor], Tensor]


@register_notrace_module
class TappedS6(S6):
    """An `S6` that shows what its linear maps read; `show` takes the place of it."""

    show: Seen
    name: str

    def project(self, u):
        return super().project(self.show(self.name, u))

    def scan(self, u, projected, order=None, merge=False):
        r, rest = projected.split([self.dt_rank, projected.shape[-1] - self.dt_rank], dim=-1)
        return super().scan(u, torch.cat([self.show(f"{self.name}.step", r), rest], -1), order, merge)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weights and inputs are quantised, by name.

    Linear maps, those per group, depthwise and causal convolutions, and `S6`. Dense convolutions (stems, downsampling)
    stay in floating point, and so do all scans.
    """
    found = {}
    for name, module in model.named_modules():
        dense = isinstance(module, nn.Conv1d | nn.Conv2d) and not module.groups == module.in_channels > 1
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | GroupedLinear | CausalConv
        if (isinstance(module, kinds) and not dense) or type(module) in (S6, TappedS6):
            found[name] = module
    return found


def tap(model: nn.Module, show: Seen) -> Callable[[], None]:
    """Calls `show(name, x)` for what each of `layers` reads, which goes on with what it returns.

    Returns:
        A function that takes all taps away again.
    """
    handles, changed = [], []
    for name, module in layers(model).items():
        if isinstance(module, S6):
            module.__class__, module.show, module.name = TappedS6, show, name
            changed.append(module)
        else:

            def hook(_: nn.Module, args: tuple, name: str) -> tuple:
                return (show(name, args[0]), *args[1:])

            handles.append(module.register_forward_pre_hook(partial(hook, name=name)))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module in changed:
            module.__class__ = S6
            del module.show, module.name

    return undo


@contextmanager
def tapped(model: nn.Module, show: Seen) -> Iterator[None]:
    """`tap` while it lasts."""
    undo = tap(model, show)
    try:
        yield
    finally:
        undo()


@torch.no_grad()
def measure(
    model: nn.Module, axes: Iterable[Axis], batches: Iterable[Tensor], covariance: bool = False
) -> dict[str, ChannelObserver]:
    """The channels of every axis that has a tap, over images.

    Args:
        model: In eval mode.
        axes: Of `invariances(model)`; those without a tap are left out.
        batches: Images ``(B, C, H, W)``.
        covariance: Whether covariances are measured too.

    Returns:
        An observer for each name of an axis.
    """
    observers = {axis.name: ChannelObserver(axis.grouped, covariance) for axis in axes if axis.tap}
    wanted: dict[str, list[str]] = {}
    for axis in axes:
        if axis.tap:
            wanted.setdefault(axis.tap, []).append(axis.name)

    def show(name: str, x: Tensor) -> Tensor:
        for axis in wanted.get(name, ()):
            observers[axis].see(x)
        return x

    with tapped(model, show):
        for images in batches:
            model(images)
    return observers
