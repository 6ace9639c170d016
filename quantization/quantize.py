"""A quantised copy of a model: channels transformed, weights rounded, inputs of layers rounded as they come.

Arithmetic is simulated: rounded numbers in floating point. Scans, norms, activations and dense convolutions are not
rounded.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linzoo.backbones.layers import S6, CausalConv, GroupedLinear

from .fake import Quantizer, Range
from .invariances import Axis, invariances
from .observers import MinMaxObserver
from .rotation import block_hadamard, klt_rotation, rotation
from .smooth import read_maxima, smoothing
from .taps import layers, measure, tap, tapped
from .transforms import fold_gains, remove_online, rotate, scale

__all__ = ["METHODS", "Quantized", "hadamard_only", "hadamard_online", "mambaquant", "minmax", "quantize", "smooth"]

Images = Sequence[Tensor]
Method = Callable[[nn.Module, Images], None]


@dataclass(frozen=True)
class Quantized:
    """What `quantize` gives.

    Attributes:
        model: The copy, whose inputs of layers are rounded by hooks.
        weight_bits: Of the weights of layers.
        activation_bits: Of the inputs of layers; None where they are not rounded.
        ranges: Of these inputs, by the names of taps.
        left: Taps of scans whose mixer multiplies by `x_proj` itself; what it reads is not rounded.
    """

    model: nn.Module
    weight_bits: int
    activation_bits: int | None
    ranges: dict[str, tuple[float, float]]
    left: tuple[str, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """An ordinary state dict of the model: its weights carry the rounding; inputs are rounded no more."""
        plain = copy.deepcopy(self.model)
        remove_online(plain)
        return plain.state_dict()

    def size(self) -> int:
        """Bytes of the weights, packed: integers and, for each output channel, a scale and a zero point of 4 bytes."""
        total = sum(x.numel() * x.element_size() for x in self.model.state_dict().values())
        for weight, quantizer in weights_of(self.model, self.weight_bits):
            scales = quantizer.range(weight)[0].numel()
            total += weight.numel() * self.weight_bits / 8 + 8 * scales - weight.numel() * weight.element_size()
        return round(total)


def weights_of(model: nn.Module, bits: int) -> list[tuple[nn.Parameter, Quantizer]]:
    """The weights of `layers`, and how they are rounded: affine, by output channel."""
    found = []
    for module in layers(model).values():
        if isinstance(module, S6):
            weights, axes = (module.x_proj, module.dt_weight), (0, 1)
        else:
            weights = (module.weight,)
            axes = (0, 1) if isinstance(module, GroupedLinear | CausalConv) else 0
        found += [(weight, Quantizer(bits, granularity="channel", axis=axes)) for weight in weights]
    return found


def minmax(model: nn.Module, images: Images) -> None:
    """Leaves all channels as they are."""


def _axes(model: nn.Module, move: str) -> list[Axis]:
    return [axis for axis in invariances(model) if move in axis.moves and axis.tap]


def smooth(model: nn.Module, images: Images) -> None:
    """Moves outliers of channels into the weights that read them, wherever a family allows scales (S1, S2, S5, S7).

    What may be scaled in weights is not scaled again as it comes.
    """
    axes = _axes(model, "scale")
    written = {axis.tap for axis in axes if not axis.online}
    axes = [axis for axis in axes if not (axis.online and axis.tap in written)]
    seen = measure(model, axes, images)
    for axis in axes:
        if seen[axis.name].largest is not None:  # layers that no image reaches show nothing
            scale(model, axis, smoothing(seen[axis.name].maxima(), read_maxima(model, axis)))


def _rotate_written(model: nn.Module, images: Images, klt: bool = True) -> None:
    """Rotates what weights write, the residual stream (R1) and the vectors of step sizes (R5), by ``K H`` or H alone.

    Folding the norms' gains before R1 takes back what `smooth` did to them.
    """
    axes = [axis for axis in _axes(model, "rotate") if not axis.online and axis.blocks == 1]
    for axis in axes:
        fold_gains(model, axis)  # K is of what the norm gives, before its gain
    seen = measure(model, axes, images, covariance=True)
    for axis in axes:
        if seen[axis.name].largest is None:
            continue
        covariance = seen[axis.name].covariance()
        R = rotation(axis.size).to(covariance).expand_as(covariance)
        rotate(model, axis, klt_rotation(covariance) if klt else R)


def _rotate_online(model: nn.Module) -> None:
    """Rotates what `out_proj` reads as it comes (R2)."""
    for axis in _axes(model, "rotate"):
        if axis.online:
            rotate(model, axis, block_hadamard(axis.size))


def hadamard_only(model: nn.Module, images: Images) -> None:
    """Hadamard matrices where weights write the channels (R1, R5), and no smoothing: for comparison."""
    _rotate_written(model, images, klt=False)


def hadamard_online(model: nn.Module, images: Images) -> None:
    """`hadamard_only`, and before `out_proj` as it comes (R2): for comparison."""
    _rotate_written(model, images, klt=False)
    _rotate_online(model)


def mambaquant(model: nn.Module, images: Images) -> None:
    """MambaQuant (arXiv 2501.13484): smoothing, ``K H`` where weights write the channels, H before `out_proj`.

    Its R1, R2, R5, S1, S2, S5 and S7; not R3, R4, R6 and S3, which rotate and scale the states of a scan, as these stay
    float32, nor S4, "which may lower", nor its percentiles.
    """
    smooth(model, images)
    _rotate_written(model, images)
    _rotate_online(model)


METHODS: dict[str, Method] = {"minmax": minmax, "smooth": smooth, "mambaquant": mambaquant}


def quantize(
    model: nn.Module,
    images: Images,
    method: Method = mambaquant,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
) -> Quantized:
    """A quantised copy of a model; the model itself stays as it is.

    Weights are rounded by output channel, inputs of layers by tensor, both affine between the least and the largest
    value, those of the inputs over all `images`.

    Args:
        model: Any model of the zoo. Methods other than `minmax` need a family that `invariances` knows.
        images: Batches ``(B, C, H, W)`` to calibrate on, as the model takes them.
        method: What is done to channels first.
        weight_bits: 2 to 16.
        activation_bits: 2 to 16; None to round weights alone.

    Raises:
        ValueError: no images; a method that finds nothing to do; a linear map or convolution that no image reaches;
            bits out of range.
    """
    if not images:
        raise ValueError("images: expected at least one batch, got none")
    model = copy.deepcopy(model).eval()
    if method is not minmax and not any(_axes(model, move) for move in ("scale", "rotate")):
        raise ValueError(f"method: {method.__name__} needs a family that declares invariances, got {_name(model)}")
    activations = Quantizer(activation_bits or 8)
    weights = weights_of(model, weight_bits)
    method(model, images)
    with torch.no_grad():
        for weight, quantizer in weights:
            weight.copy_(quantizer(weight))
    if activation_bits is None:
        return Quantized(model, weight_bits, None, {}, ())

    observers = {name: MinMaxObserver(activations) for name in layers(model)}

    def see(name: str, x: Tensor) -> Tensor:
        observers.setdefault(name, MinMaxObserver(activations)).see(x)
        return x

    with torch.no_grad(), tapped(model, see):
        for batch in images:
            model(batch)
    unseen = [name for name, observer in observers.items() if observer.low is None]
    missed = [name for name in unseen if not isinstance(model.get_submodule(name), S6)]
    if missed:
        raise ValueError(f"model: no image reaches {missed[0]!r} of {_name(model)}; expected all layers to be used")
    found: dict[str, Range] = {name: observer.range() for name, observer in observers.items() if name not in unseen}
    tap(model, lambda name, x: activations(x, found[name]) if name in found else x)
    ranges = {name: (float(low), float(high)) for name, (low, high) in found.items()}
    return Quantized(model, weight_bits, activation_bits, ranges, tuple(unseen))


def _name(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", {})
    return repr(cfg.get("architecture", type(model).__name__))
