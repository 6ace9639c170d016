"""A quantised copy of a model: channels transformed, weights rounded, layer inputs rounded at run time.

Arithmetic is simulated: rounded numbers in floating point. Scans, norms, activations and dense convolutions are not
rounded. A method may round the inputs of scans and softmax attention.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linzoo.backbones.layers import S6, CausalConv, GroupedLinear

from .fake import LogQuantizer, Quantizer, Range
from .gptq import gptq, second_moments
from .invariances import Axis, invariances
from .observers import BestRangeObserver, MinMaxObserver, Observer
from .reorder import scan_axes, sort_channels
from .reparam import fold_ranges
from .rotation import block_hadamard, klt_rotation, rotation
from .smooth import read_maxima, smoothing
from .taps import layers, measure, tap, tapped
from .transforms import Online, fold_gains, online_matrices, remove_online, rotate, scale

__all__ = [
    "METHODS",
    "Method",
    "Quantized",
    "hadamard_online",
    "hadamard_only",
    "mambaquant",
    "minmax",
    "quamba2",
    "quantize",
    "repq",
    "simulate",
    "smooth",
]

Images = Sequence[Tensor]
Clusters = dict[str, Tensor]
Input = tuple[Quantizer | LogQuantizer, Range]
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Method:
    """What happens to channels before rounding, and how values are rounded.

    Attributes:
        name: The key in `METHODS`.
        transform: Changes a model's weights but not its outputs; returns clusters ``(n,)`` of the channels that a tap
            shows, each with its own range.
        applies: Whether a model has what the method needs, and what that is, in words.
        best_ranges: Whether input ranges are the best of some quantiles, not the smallest and the largest value.
        attention: Whether the factors of softmax attention are rounded.
        scans: Whether x, B and C of scans are rounded, symmetrically; B and C per scan.
        symmetric: Whether weights are rounded symmetrically.
        group: Input channels that share a scale in weights of 4 bits or fewer; None for a whole row.
        gptq: Whether weights of 4 bits or fewer are rounded by GPTQ, not to the nearest value.
    """

    name: str
    transform: Callable[[nn.Module, Images], Clusters | None]
    applies: tuple[Callable[[nn.Module], bool], str]
    best_ranges: bool = False
    attention: bool = False
    scans: bool = False
    symmetric: bool = False
    group: int | None = None
    gptq: bool = False

    def rounding(self, weight_bits: int) -> "Rounding":
        """How it rounds weights of so many bits."""
        return "gptq" if self.gptq and weight_bits <= 4 else "nearest"


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    Attributes:
        model: The copy; hooks round the inputs of its layers.
        weight_bits: Bits of layer weights.
        activation_bits: Bits of layer inputs; None if they are not rounded.
        inputs: How these inputs are rounded, by tap name.
        left: Taps of scans whose mixer multiplies by `x_proj` itself; its inputs there are not rounded.
        method: The method used.
    """

    model: nn.Module
    weight_bits: int
    activation_bits: int | None
    inputs: dict[str, Input]
    left: tuple[str, ...]
    method: Method

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Ranges of the inputs, by tap name; over all clusters if a method has some."""
        return {name: (float(low.min()), float(high.max())) for name, (_, (low, high)) in self.inputs.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """An ordinary state dict of the model, with rounded weights; inputs are no longer rounded."""
        plain = copy.deepcopy(self.model)
        remove_online(plain)
        return plain.state_dict()

    def simulation(self) -> dict[str, Any]:
        """What `state_dict` lacks, as plain data for `simulate`; empty if inputs are not rounded.

        ``inputs`` has the quantiser and the range of each tap. ``online`` has the matrices by which hooks multiply a
        module's input, and its weight as rounded, since `state_dict` undoes these matrices there.
        """
        if not self.inputs:
            return {}
        online = {
            name: (self.model.get_parameter(f"{name}.weight").detach().clone(), matrices)
            for name, matrices in online_matrices(self.model).items()
        }
        inputs = {name: (asdict(quantizer), low, high) for name, (quantizer, (low, high)) in self.inputs.items()}
        return dict(inputs=inputs, online=online, scans=self.method.scans, attention=self.method.attention)

    def size(self) -> int:
        """Bytes of the weights, packed: integers, and 4 bytes each for every scale and its zero point."""
        total = sum(x.numel() * x.element_size() for x in self.model.state_dict().values())
        for weight, quantizer in weights_of(self.model, self.weight_bits, self.method).values():
            grouped = quantizer.granularity == "group"
            scales = weight.numel() // quantizer.group if grouped else quantizer.range(weight)[0].numel()
            total += weight.numel() * self.weight_bits / 8 + 8 * scales - weight.numel() * weight.element_size()
        return round(total)


def weights_of(model: nn.Module, bits: int, method: Method) -> dict[str, tuple[nn.Parameter, Quantizer]]:
    """The weights of `layers` by the tap of what they read, and how they are rounded.

    Each output channel has its own grid, or each group if a method has groups.
    """
    found = {}

    def add(name: str, weight: nn.Parameter, axis: int | tuple[int, ...]) -> None:
        grouped = method.group and bits <= 4 and weight.shape[-1] % method.group == 0
        kind = "group" if grouped else "channel"
        found[name] = weight, Quantizer(bits, method.symmetric, kind, axis, method.group or 1)

    for name, module in layers(model).items():
        if isinstance(module, S6):
            add(name, module.x_proj, (0, 1))
            add(f"{name}.step", module.dt_weight, (0, 1))
        else:
            add(name, module.weight, (0, 1) if isinstance(module, GroupedLinear | CausalConv) else 0)
    return found


def _nothing(model: nn.Module, images: Images) -> None:
    """Leaves all channels as they are."""


def _axes(model: nn.Module, move: str) -> list[Axis]:
    return [axis for axis in invariances(model) if move in axis.moves and axis.tap]


def _smooth(model: nn.Module, images: Images) -> None:
    """Moves outliers of channels into the weights that read them, wherever a family allows scales (S1, S2, S5, S7).

    Channels that can be scaled in weights are not scaled again at run time.
    """
    axes = _axes(model, "scale")
    written = {axis.tap for axis in axes if not axis.online}
    axes = [axis for axis in axes if not (axis.online and axis.tap in written)]
    seen = measure(model, axes, images)
    for axis in axes:
        if seen[axis.name].largest is not None:  # layers that no image reaches show nothing
            scale(model, axis, smoothing(seen[axis.name].maxima(), read_maxima(model, axis)))


def _rotate_written(model: nn.Module, images: Images, klt: bool = True) -> None:
    """Rotates channels that weights write, the residual stream (R1) and the step size vectors (R5), by ``K H`` or H.

    Folding the norms' gains before R1 undoes what `smooth` did to them.
    """
    axes = [axis for axis in _axes(model, "rotate") if not axis.online and axis.blocks == 1]
    for axis in axes:
        fold_gains(model, axis)  # K belongs to the norm's output before its gain
    seen = measure(model, axes, images, covariance=True)
    for axis in axes:
        if seen[axis.name].largest is None:
            continue
        covariance = seen[axis.name].covariance()
        R = rotation(axis.size).to(covariance).expand_as(covariance)
        rotate(model, axis, klt_rotation(covariance) if klt else R)


def _rotate_online(model: nn.Module) -> None:
    """Rotates the input of `out_proj` at run time (R2)."""
    for axis in _axes(model, "rotate"):
        if axis.online:
            rotate(model, axis, block_hadamard(axis.size))


def _hadamard_only(model: nn.Module, images: Images) -> None:
    """Hadamard matrices where weights write the channels (R1, R5), without smoothing: for comparison."""
    _rotate_written(model, images, klt=False)


def _hadamard_online(model: nn.Module, images: Images) -> None:
    """`_hadamard_only`, plus a run-time rotation before `out_proj` (R2): for comparison."""
    _rotate_written(model, images, klt=False)
    _rotate_online(model)


def _mambaquant(model: nn.Module, images: Images) -> None:
    """MambaQuant (arXiv 2501.13484): smoothing, ``K H`` where weights write the channels, H before `out_proj`.

    Its R1, R2, R5, S1, S2, S5 and S7. R3, R4, R6 and S3 rotate and scale the states of a scan; they are left out, as
    these states stay float32. So are S4, "which may lower", and its percentiles.
    """
    _smooth(model, images)
    _rotate_written(model, images)
    _rotate_online(model)


def _norm_axes(model: nn.Module) -> list[Axis]:
    """Axes from the norm of a block to the linear maps that read it."""
    return [axis for axis in _axes(model, "scale") if axis.name.rpartition(".")[2].startswith("norm")]


def _repq(model: nn.Module, images: Images) -> None:
    """RepQ-ViT's fold (arXiv 2212.08254): all channels after a block's norm get one range."""
    channels = Quantizer(8, granularity="channel", axis=-1)
    axes = {axis.tap: axis for axis in _norm_axes(model)}
    seen = {name: MinMaxObserver(channels) for name in axes}

    def see(name: str, x: Tensor) -> Tensor:
        if name in seen:
            seen[name].see(x)
        return x

    with torch.no_grad(), tapped(model, see):
        for batch in images:
            model(batch)
    for name, axis in axes.items():
        if seen[name].low is not None:
            low, high = (x.flatten() for x in seen[name].range())
            fold_ranges(model, axis, low, high, Quantizer(8))


def _quamba2(model: nn.Module, images: Images) -> Clusters:
    """Quamba2 (arXiv 2503.22879): scan inputs are sorted and clustered; H in the stream and before `out_proj`.

    Heads keep their places, since a cluster need not be contiguous here.
    """
    found = sort_channels(model, images)
    for axis in _axes(model, "rotate"):
        if axis.name == "stream":
            rotate(model, axis, rotation(axis.size))
    _rotate_online(model)
    return found


_any_axis = (
    lambda model: any(_axes(model, move) for move in ("scale", "rotate")),
    "a family that declares invariances",
)
minmax = Method("minmax", _nothing, (lambda model: True, ""))
smooth = Method("smooth", _smooth, _any_axis)
hadamard_only = Method("hadamard_only", _hadamard_only, _any_axis)
hadamard_online = Method("hadamard_online", _hadamard_online, _any_axis)
mambaquant = Method("mambaquant", _mambaquant, _any_axis)
repq = Method(
    "repq",
    _repq,
    (lambda model: bool(_norm_axes(model)), "a family that declares what reads its norms"),
    best_ranges=True,
    attention=True,
)
quamba2 = Method(
    "quamba2",
    _quamba2,
    (lambda model: bool(scan_axes(model)), "a family that declares the channels of its scans"),
    scans=True,
    symmetric=True,
    group=128,
    gptq=True,
)
METHODS: dict[str, Method] = {method.name: method for method in (minmax, smooth, mambaquant, repq, quamba2)}


class _ClusterObserver(MinMaxObserver):
    """The range of each cluster, for each of its channels."""

    def __init__(self, quantizer: Quantizer, labels: Tensor):
        super().__init__(quantizer)
        self.labels = labels

    def range(self) -> Range:
        low, high = (x.clone() for x in super().range())
        labels = self.labels.to(low.device)
        for label in labels.unique():
            mine = labels == label
            low[..., mine], high[..., mine] = low[..., mine].amin(), high[..., mine].amax()
        return low, high


def _rounding(
    name: str, scans: set[str], bits: int, method: Method, clusters: Clusters
) -> tuple[Quantizer | LogQuantizer, Observer]:
    """How the input of a tap is rounded, and what finds its range."""
    if name in clusters:
        quantizer = Quantizer(bits, True, "channel", -1)
        return quantizer, _ClusterObserver(quantizer, clusters[name])
    owner, _, part = name.rpartition(".")
    if method.scans and part in ("x", "B", "C"):
        quantizer = Quantizer(bits, True, "channel", -2) if owner in scans else Quantizer(bits, True)
        return quantizer, MinMaxObserver(quantizer)
    if part == "softmax":
        return LogQuantizer(bits), BestRangeObserver(LogQuantizer(bits))
    quantizer = Quantizer(bits, method.scans)
    return quantizer, BestRangeObserver(quantizer) if method.best_ranges else MinMaxObserver(quantizer)


def quantize(
    model: nn.Module,
    images: Images,
    method: Method = mambaquant,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    rounding: Rounding | None = None,
) -> Quantized:
    """A quantised copy of a model; the model itself is unchanged.

    Unless the method says otherwise, weights are rounded per output channel and layer inputs per tensor. Both are
    affine between the smallest and the largest value; for inputs, over all `images`.

    Args:
        model: Any model of the zoo. Methods other than `minmax` need a family that declares what they change.
        images: Batches ``(B, C, H, W)`` to calibrate on, as the model takes them.
        method: What happens to channels first.
        weight_bits: 2 to 16.
        activation_bits: 2 to 16; None to round only weights.
        rounding: 'nearest', or 'gptq' for linear maps (`linzoo.quantization.gptq`, on what they read before anything
            is rounded); None for the method's own.

    Raises:
        ValueError: there are no images; the method does not apply; no image reaches a linear map or convolution; bits
            are out of range; `rounding` is neither.
    """
    rounding = rounding or method.rounding(weight_bits)
    if rounding not in ("nearest", "gptq"):
        raise ValueError(f"rounding: expected nearest or gptq, got {rounding!r}")
    if not images:
        raise ValueError("images: expected at least one batch, got none")
    model = copy.deepcopy(model).eval()
    applies, needed = method.applies
    if not applies(model):
        raise ValueError(f"method: {method.name} needs {needed}, got {_name(model)}")
    weights = weights_of(model, weight_bits, method)
    if activation_bits is not None:
        Quantizer(activation_bits)
    clusters = method.transform(model, images) or {}
    moments = second_moments(model, images) if rounding == "gptq" else {}
    with torch.no_grad():
        for name, (weight, quantizer) in weights.items():
            weight.copy_(gptq(weight, moments[name], quantizer) if name in moments else quantizer(weight))
    if activation_bits is None:
        return Quantized(model, weight_bits, None, {}, (), method)

    scans = {name for name, module in model.named_modules() if isinstance(module, S6)}
    observed = {name: _rounding(name, scans, activation_bits, method, clusters) for name in layers(model)}
    kinds = dict(scans=method.scans, attention=method.attention)

    def see(name: str, x: Tensor) -> Tensor:
        if name not in observed:
            observed[name] = _rounding(name, scans, activation_bits, method, clusters)
        observed[name][1].see(x)
        return x

    with torch.no_grad(), tapped(model, see, **kinds):
        for batch in images:
            model(batch)
    found: dict[str, Input] = {}
    unseen = []
    for name, (quantizer, observer) in observed.items():
        try:
            found[name] = quantizer, observer.range()
        except ValueError:
            unseen.append(name)
    missed = [name for name in unseen if name not in scans]
    if missed:
        raise ValueError(f"model: no image reaches {missed[0]!r} of {_name(model)}; expected all layers to be used")

    _round_inputs(model, found, **kinds)
    return Quantized(model, weight_bits, activation_bits, found, tuple(unseen), method)


def _round_inputs(model: nn.Module, inputs: Mapping[str, Input], **kinds: bool) -> None:
    def rounded(name: str, x: Tensor) -> Tensor:
        if name not in inputs:
            return x
        quantizer, (low, high) = inputs[name]
        return quantizer(x, (low.to(x), high.to(x)))

    tap(model, rounded, **kinds)


@torch.no_grad()
def simulate(model: nn.Module, simulation: Mapping[str, Any]) -> None:
    """Make a model with the weights of `Quantized.state_dict` compute what the quantised one does, in place.

    Args:
        model: Of the same kind, in eval mode.
        simulation: From `Quantized.simulation`; plain data, which `torch.load` reads with ``weights_only=True``.

    Raises:
        ValueError: it is not of this form, or belongs to another model.
    """
    modules = dict(model.named_modules())
    try:
        inputs = {
            name: ((Quantizer if "symmetric" in settings else LogQuantizer)(**settings), (low, high))
            for name, (settings, low, high) in simulation["inputs"].items()
        }
        for name in inputs:
            if name not in modules:
                modules[name.rpartition(".")[0]]  # a tap inside that module
        for name, (weight, matrices) in simulation["online"].items():
            modules[name].get_parameter("weight").copy_(weight)
            for matrix in matrices:
                modules[name].register_forward_pre_hook(Online(matrix))
        kinds = {kind: bool(simulation[kind]) for kind in ("scans", "attention")}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"simulation: expected that of {_name(model)}, got another ({type(e).__name__}: {e})") from e
    _round_inputs(model, inputs, **kinds)


def _name(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", {})
    return repr(cfg.get("architecture", type(model).__name__))
