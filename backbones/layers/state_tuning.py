"""State tuning (arXiv 2504.05097): only the initial states of the scans are trained.

A token mixer that can be tuned has an attribute `time_state`: None or a parameter ``(directions, H, P, N)``, values
before keys, shared by all samples. `add_state` creates one of zeros. Zeros change nothing, so a tuned model starts as
the original model. For an image, such a state acts like tokens before the first one and after the last one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAME = "time_state"


def mixers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The mixers of a model whose states can be tuned, by name; ValueError if it has none."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, NAME)}
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no matrix states to tune; expected mixers of RWKV-6 or 7, such as "
            "those of vrwkv6_t"
        )
    return found


def tune_states(model: nn.Module, head: bool = True) -> None:
    """Freezes a timm model except the states of its mixers, which start at 0 if they did not exist.

    Args:
        model: The model.
        head: Whether its classifier is trained, too.

    Raises:
        ValueError: none of its mixers has such states.
    """
    mixers = mixers_of(model)
    model.requires_grad_(False)
    for mixer in mixers.values():
        if mixer.time_state is None:
            mixer.add_state()
        mixer.time_state.requires_grad_(True)
    if head and isinstance(model.get_classifier(), nn.Module):
        model.get_classifier().requires_grad_(True)


def tuned_states(model: nn.Module) -> dict[str, Tensor]:
    """The states, and whatever else has a gradient: what `save_states` writes. Empty for a model without states."""
    mixers = {name: m for name, m in model.named_modules() if getattr(m, NAME, None) is not None}
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {f"{name}.{NAME}" for name in mixers} | (learns if mixers else set())
    return {key: value for key, value in model.state_dict().items() if key in names}


def save_states(model: nn.Module, path: str | Path) -> None:
    """Writes `tuned_states` to a safetensors file; ValueError if there are none."""
    states = tuned_states(model)
    if not states:
        raise ValueError(f"model: {type(model).__name__} has no tuned states; expected one after state_tuning()")
    save_file({key: value.contiguous() for key, value in states.items()}, path)


def load_states(model: nn.Module, states: str | Path | Mapping[str, Tensor]) -> None:
    """Loads the states from `save_states` into the model that they were tuned for, which then uses them.

    RWKV-PEFT's names and layout also load: ``blocks.{i}.att.time_state``, values before keys ``(H, P, N)``, is the
    state before the first token; the state after the last one is 0.

    Args:
        model: The model.
        states: A safetensors or PyTorch file, or a state dict.

    Raises:
        ValueError: a state is missing, or a tensor is unknown or has another shape; the model is unchanged.
        FileNotFoundError: there is no such file.
    """
    source = "states" if isinstance(states, Mapping) else f"states {str(states)!r}"
    if not isinstance(states, Mapping):
        load = load_file if str(states).endswith(".safetensors") else torch.load
        states = load(states, **({"weights_only": True, "map_location": "cpu"} if load is torch.load else {}))
    given = {key.replace(f".att.{NAME}", f".mixer.{NAME}"): value for key, value in states.items()}
    mixers = mixers_of(model)
    ours, absent = {key: tuple(value.shape) for key, value in model.state_dict().items()}, []
    for name, mixer in mixers.items():
        key, shape = f"{name}.{NAME}", mixer.state_shape
        ours[key] = shape
        if key not in given:
            absent.append(key)
        elif tuple(given[key].shape) == shape[1:]:
            given[key] = torch.stack([given[key], *[torch.zeros_like(given[key])] * (shape[0] - 1)])
    wrong = [key for key, value in given.items() if tuple(value.shape) != ours.get(key)]
    for key in absent + wrong:
        got = tuple(given[key].shape) if key in given else "absent"
        raise ValueError(f"{source}: {key}: expected {ours.get(key, 'absent')}, got {got}")
    for mixer in mixers.values():
        if mixer.time_state is None:
            mixer.add_state()
    model.load_state_dict(given, strict=False)
