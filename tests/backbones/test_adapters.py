"""Low-rank adapters: they begin as nothing, merge exactly, and compute what WaRA's module does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from linzoo.backbones.layers import GroupedLinear, WaRA
from linzoo.backbones.layers.adapters import ADAPTERS, WaveletLoRA, adapt, merge_adapters, plain_to_adapted


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Unflatten(-1, (3, 4)), GroupedLinear(3, 4, 6)).double()


@torch.no_grad()
def learn(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".weight.0." in name:
            parameter.normal_()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merge_is_exact(kind):
    model, x = network(), torch.randn(5, 8, dtype=torch.float64)
    before = model(x)
    adapt([model[0], model[3]], kind, rank=2, alpha=3)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        f"{i}.parametrizations.weight.original" for i in (0, 3)
    }
    learn(model)
    learnt = model(x)
    assert (learnt - before).abs().max() > 0.1
    merge_adapters(model)
    torch.testing.assert_close(model(x), learnt, rtol=0, atol=1e-12)
    assert model.state_dict().keys() == network().state_dict().keys()
    assert not any(parametrize.is_parametrized(module) for module in model)


def test_wara_as_a_matrix():
    linear = nn.Linear(8, 12).double()
    module = WaRA(copy.deepcopy(linear), rank=3, alpha=2)
    adapter = WaveletLoRA(linear.weight, 3, 2)
    with torch.no_grad():
        module.B.normal_()
        adapter.A.copy_(module.A)
        adapter.B.copy_(module.B)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = module(x)
    torch.testing.assert_close(adapter.delta(), module.delta(), rtol=0, atol=1e-12)
    parametrize.register_parametrization(linear, "weight", adapter)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-12)


def test_plain_weights_start_an_adapted_model():
    plain, x = network(), torch.randn(5, 8, dtype=torch.float64)
    model = network()
    adapt([model[0], model[3]], "lora")
    learn(model)
    model.load_state_dict(plain_to_adapted(plain.state_dict(), model.state_dict()))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert plain_to_adapted(model.state_dict(), model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([nn.Linear(4, 4)], "dora"), "kind: expected lora or wara, got 'dora'"),
        (([nn.Linear(4, 4)], "lora", 0), "rank: expected at least 1, got 0"),
        (([], "lora"), "modules: expected at least one with a weight, got none"),
        (([nn.Linear(3, 4)], "wara"), r"weight: expected multiples of 2 features, got \(4, 3\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt(*arguments)
