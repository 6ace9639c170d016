"""Shows a function the inputs of quantised layers: of linear maps and of depthwise convolutions.

A tap has its module's name. An `S6` holds its linear maps as bare parameters: its own name is the tap for the input of
`x_proj`, and ``<name>.step`` that for the narrow vector r that `dt_weight` reads inside the scan. On demand
``<name>.x``, ``.B`` and ``.C`` of a mixer or `S6` are its scan's inputs, and ``<name>.query``, ``.key``, ``.softmax``
and ``.value`` are the factors of softmax attention's products.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from linzoo.backbones import vssd
from linzoo.backbones.layers import NCSSD, S6, CausalConv, GroupedLinear

from .invariances import Axis
from .observers import ChannelObserver

__all__ = ["layers", "measure", "tap", "tapped"]

Seen = Callable[[str, Tensor], Tensor]
ATTENTION = (Attention, vssd.Attention)


@register_notrace_module
class TappedS6(S6):
    """An `S6` that shows the inputs of its linear maps; it then uses what `show` returns."""

    show: Seen
    name: str
    scans: bool

    def project(self, u):
        return super().project(self.show(self.name, u))

    def scan(self, u, projected, order=None, merge=False):
        r, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.scans:
            u, B, C = (self.show(f"{self.name}.{part}", x) for part, x in (("x", u), ("B", B), ("C", C)))
        return super().scan(u, torch.cat([self.show(f"{self.name}.step", r), B, C], -1), order, merge)


class TappedNCSSD(NCSSD):
    """An `NCSSD` that shows its scan's inputs."""

    show: Seen
    name: str

    def scan(self, x, weight, B, C):
        x, B, C = (self.show(f"{self.name}.{part}", value) for part, value in (("x", x), ("B", B), ("C", C)))
        return super().scan(x, weight, B, C)


class TappedAttention(TorchFunctionMode):
    """Shows the factors in softmax attention's products, while a module runs."""

    def __init__(self, name: str, show: Seen):
        self.name, self.show = name, show

    def enter(self, *args) -> None:
        self.__enter__()

    def leave(self, *args) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        if is_causal:
            raise ValueError(f"model: attention {self.name!r} is causal; expected that of images")
        q, k, v = (
            self.show(f"{self.name}.{part}", x) for part, x in (("query", query), ("key", key), ("value", value))
        )
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.show(f"{self.name}.softmax", scores.softmax(-1)) @ v


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weights and inputs are quantised, by name.

    These are linear maps (also per group), depthwise and causal convolutions, and `S6`. Dense convolutions (stems,
    downsampling) stay in floating point, and so do all scans.
    """
    found = {}
    for name, module in model.named_modules():
        dense = isinstance(module, nn.Conv1d | nn.Conv2d) and not module.groups == module.in_channels > 1
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | GroupedLinear | CausalConv
        if (isinstance(module, kinds) and not dense) or type(module) in (S6, TappedS6):
            found[name] = module
    return found


def tap(model: nn.Module, show: Seen, scans: bool = False, attention: bool = False) -> Callable[[], None]:
    """Calls `show(name, x)` for the input x of each of `layers`, which then uses the returned tensor instead.

    Args:
        model: Changed in place.
        show: Called with tap names.
        scans: Whether inputs of selective scans and of NC-SSD are shown, too.
        attention: Whether the factors of softmax attention are shown, too.

    Returns:
        A function that removes all taps.
    """
    handles, changed = [], []

    def change(module: nn.Module, kind: type, **attributes: object) -> None:
        changed.append((module, type(module), attributes))
        module.__class__ = kind
        for key, value in attributes.items():
            setattr(module, key, value)

    for name, module in model.named_modules():
        if scans and type(module) is NCSSD:
            change(module, TappedNCSSD, show=show, name=name)
        if attention and type(module) in ATTENTION:
            mode = TappedAttention(name, show)
            handles.append(module.register_forward_pre_hook(mode.enter))
            handles.append(module.register_forward_hook(mode.leave, always_call=True))
    for name, module in layers(model).items():
        if isinstance(module, S6):
            change(module, TappedS6, show=show, name=name, scans=scans)
        else:

            def hook(_: nn.Module, args: tuple, name: str) -> tuple:
                return (show(name, args[0]), *args[1:])

            handles.append(module.register_forward_pre_hook(partial(hook, name=name)))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module, kind, attributes in reversed(changed):
            module.__class__ = kind
            for key in attributes:
                delattr(module, key)

    return undo


@contextmanager
def tapped(model: nn.Module, show: Seen, **kinds: bool) -> Iterator[None]:
    """A context manager for `tap`."""
    undo = tap(model, show, **kinds)
    try:
        yield
    finally:
        undo()


@torch.no_grad()
def measure(
    model: nn.Module, axes: Iterable[Axis], batches: Iterable[Tensor], covariance: bool = False
) -> dict[str, ChannelObserver]:
    """Observes the channels of every axis that has a tap, over images.

    Args:
        model: In eval mode.
        axes: Of `invariances(model)`; those without a tap are left out.
        batches: Images ``(B, C, H, W)``.
        covariance: Whether covariances are measured too.

    Returns:
        An observer for each axis name.
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
