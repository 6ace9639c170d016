"""Rounding by statistics, its gradient, and which weights stay."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from linzoo.quantization.ofq import StatsQ, quantize_weights, settle_weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels(bits):
    weight = torch.randn(6, 400, dtype=torch.float64).requires_grad_()
    rounded = StatsQ(bits)(weight)
    alpha = 2 * weight.detach().abs().mean(1, keepdim=True)
    levels = rounded.detach() / alpha * 2 ** (bits - 1) - 0.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    levels = levels.round()
    assert levels.min() >= -(2 ** (bits - 1)) and levels.max() <= 2 ** (bits - 1) - 1
    inside = weight.detach().abs() < alpha
    assert ((rounded - weight).abs() <= alpha / 2**bits + 1e-6)[inside].all()
    (3 * rounded).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3))
    with pytest.raises(ValueError, match="bits: expected 2 to 8, got 1"):
        StatsQ(1)


def test_training_and_settling():
    """Frozen weights keep their values, those at a boundary learn; a plain model computes the same afterwards."""
    from linzoo.tools.engine import AnnealHook, InputError

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), torch.randn(8, 64)
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    quantize_weights([model[0]], 2)
    weight, rounding = model[0].parametrizations["weight"].original, model[0].parametrizations["weight"][0]
    settled = rounding.settled(weight, 0.05)
    assert 0 < (~settled).sum() < 0.3 * settled.numel()
    hook, run = AnnealHook(begin=1, boundary=0.05), SimpleNamespace(model=model, epoch=0)
    hook.before_train(run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for run.epoch in (0, 1):
        before = weight.detach().clone()
        settled = rounding.settled(before, 0.05)
        hook.before_train_iter(run, 0)
        model(x).square().sum().backward()
        optimizer.step()
        hook.after_train_iter(run, 0)
        same = weight.detach() == before
        assert not same[~settled].all() and same[settled].all() == (run.epoch == 1)
    expected = model(x)
    settle_weights(model)
    torch.testing.assert_close(model(x), expected)
    assert model.state_dict().keys() == plain.keys()
    assert all(row.unique().numel() <= 4 for row in model[0].weight)
    with pytest.raises(InputError, match="AnnealHook: no weight is rounded; expected model.weight_bits"):
        AnnealHook(1).before_train(run)
