"""RepQ-ViT's reparametrisation (arXiv 2212.08254, section 3.2): one scale for all channels after a LayerNorm."""

import torch
from torch import Tensor, nn

from .fake import Quantizer
from .invariances import Axis, Slot
from .transforms import scale

__all__ = ["fold_ranges", "shift"]


def _biases(model: nn.Module, axis: Axis) -> tuple[Slot, list[nn.Linear]] | None:
    """The bias of the norm that writes the channels, and the linear maps that read them, if these have biases too."""
    writers = [slot for slot in axis.slots if slot.power < 0 and slot.name.endswith(".bias")]
    readers = [model.get_submodule(slot.name.rpartition(".")[0]) for slot in axis.slots if slot.power > 0]
    linear = [module for module in readers if isinstance(module, nn.Linear) and module.bias is not None]
    norm = model.get_submodule(axis.slots[0].name.rpartition(".")[0])
    if len(writers) != 1 or not isinstance(norm, nn.LayerNorm) or not linear or len(linear) < len(readers):
        return None
    return writers[0], linear


@torch.no_grad()
def shift(model: nn.Module, axis: Axis, b: Tensor) -> None:
    """Subtract `b` ``(n,)`` from a LayerNorm's output, and add ``W b`` to the biases of the maps that read it.

    Raises:
        ValueError: the axis is not between a LayerNorm with a bias and linear maps with biases.
    """
    found = _biases(model, axis)
    if found is None or axis.name != axis.slots[0].name.rpartition(".")[0]:
        raise ValueError(f"axis: expected one between a LayerNorm and linear maps with biases, got {axis.name!r}")
    writer, readers = found
    for linear in readers:
        linear.bias.add_(linear.weight.double() @ b.double().to(linear.weight.device))
    model.get_parameter(writer.name).sub_(b.to(linear.weight.device))


def fold_ranges(model: nn.Module, axis: Axis, low: Tensor, high: Tensor, quantizer: Quantizer) -> bool:
    """Make the channels' ranges equal, so that one quantiser per tensor does the work of one per channel.

    With scales s_c and smallest values m_c of the channels, ``s`` the scales' mean and z the zero points' mean::

        r = s_c / s;    b = m_c / r + z s;    gain / r;    bias / r - b;    W r;    bias + W b

    If the maps after the norm have no biases, ranges around 0 are used, and b is 0.

    Args:
        low, high: Smallest and largest values ``(n,)`` of the channels of `axis`, which must allow scales.
        quantizer: The quantiser of the activations.

    Returns:
        Whether the channels were also shifted.
    """
    low, high = low.double(), high.double()
    shifted = not quantizer.symmetric and _biases(model, axis) is not None
    if not shifted:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    least, largest = quantizer.grid
    steps = ((high - low) / (largest - least)).clamp(min=torch.finfo(torch.float32).tiny)
    r = steps / steps.mean()
    scale(model, axis, r)
    if shifted:
        zero = (-low / steps).round().mean()
        shift(model, axis, low / r + zero * steps.mean())
    return shifted
