"""GPTQ: the outputs that it keeps, the grid, and which inputs it reads."""

import copy

import pytest
import torch
from test_invariances import built, images
from torch import nn

from linzoo.backbones.layers import S6, GroupedLinear
from linzoo.quantization import Quantizer, gptq, layers, second_moments, tapped
from linzoo.quantization.quantize import minmax, quantize

ROWS = Quantizer(4, granularity="channel")
GROUPS = Quantizer(4, True, "group", group=32)


def correlated(n, seed=0, count=2000):
    """Rows of inputs whose channels share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    few, mix = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((count, 8), (8, n)))
    return few @ mix + 0.3 * torch.randn(count, n, generator=generator, dtype=torch.float64)


def weight(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("quantizer", [ROWS, GROUPS])
@pytest.mark.parametrize("n", [32, 160])
def test_outputs_err_less_than_those_of_the_nearest(quantizer, n):
    """Also on inputs that were not seen."""
    x, unseen, W = correlated(n), correlated(n)[1000:] + 0.1, weight(24, n)
    found = gptq(W, x.T @ x / len(x), quantizer)
    for inputs in (x, unseen):
        ours, nearest = (((rounded - W) @ inputs.T).square().mean() for rounded in (found, quantizer(W)))
        assert ours < 0.5 * nearest
    for part in found.unflatten(-1, (-1, 32)).flatten(0, 1) if quantizer is GROUPS else found:
        assert part.unique().numel() <= 16


def test_columns_in_turn():
    """As the least squares of each column's error by those after it, written out; blocks change nothing."""
    x, W = correlated(140), weight(3, 140)
    H = x.T @ x / len(x)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(140, dtype=torch.float64)
    expected, (low, high) = W.clone(), W.aminmax(dim=1, keepdim=True)
    for j in range(140):
        rounded = ROWS(expected[:, j : j + 1], (low, high))
        error = expected[:, j : j + 1] - rounded
        rest = damped[j + 1 :, j + 1 :]
        expected[:, j + 1 :] += error @ torch.linalg.solve(rest, damped[j + 1 :, j : j + 1]).T
        expected[:, j : j + 1] = rounded
    torch.testing.assert_close(gptq(W, H, ROWS), expected)


def test_many_bits_and_independent_channels_round_to_the_nearest():
    W, x = weight(5, 24), correlated(24)
    torch.testing.assert_close(gptq(W, x.T @ x, Quantizer(16, granularity="channel")), W, atol=1e-3, rtol=0)
    assert torch.equal(gptq(W, torch.diag(torch.arange(24.0)), ROWS), ROWS(W))
    assert gptq(W.float(), x.T @ x, ROWS).dtype == torch.float32


def test_dead_channels():
    """They round to the nearest; the others are as without them."""
    x, W = correlated(24), weight(5, 24)
    x[:, [3, 10]] = 0
    alive = [i for i in range(24) if i not in (3, 10)]
    W[:, [3, 10]] *= 0.1  # ranges are those of the others
    found = gptq(W, x.T @ x / len(x), ROWS, damping=0)
    some = W[:, alive], x[:, alive].T @ x[:, alive] / len(x)
    torch.testing.assert_close(found[:, alive], gptq(*some, ROWS, damping=0))
    torch.testing.assert_close(found[:, [3, 10]], ROWS(W)[:, [3, 10]])
    assert torch.equal(gptq(W, torch.zeros(24, 24), ROWS), ROWS(W))


def test_groups_of_maps():
    W, moments = weight(2, 5, 24), torch.stack([x.T @ x for x in (correlated(24), correlated(24, 7))])
    found = gptq(W, moments, ROWS)
    for g in range(2):
        assert torch.equal(found[g], gptq(W[g], moments[g], ROWS))
    assert torch.equal(gptq(W, moments[0], ROWS)[1], gptq(W[1], moments[0], ROWS))
    with pytest.raises(ValueError, match=r"moments: expected the shape \(24, 24\) or \(G, 24, 24\), got \(3, 3\)"):
        gptq(W, torch.eye(3), ROWS)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vim", "vmamba", "groupmamba", "plain_nc_ssd", "kat"])
def test_inputs_of_every_linear_map(family):
    """The moments are those of what each map reads; GPTQ errs less than the nearest in each of the first maps."""
    model, x = built(family), images(torch.float64)
    moments, seen = second_moments(model, [x[:1], x[1:]]), {}

    def see(name, value):
        seen[name] = value
        return value

    with tapped(model, see):
        model(x)
    maps = {name for name, m in layers(model).items() if isinstance(m, nn.Linear | GroupedLinear | S6)}
    assert maps <= set(moments) and {name for name in seen if name.endswith(".step")} <= set(moments)
    for name, moment in moments.items():
        rows = seen[name].flatten(0, -2) if moment.dim() == 2 else seen[name].flatten(0, -3)[:, 0]
        torch.testing.assert_close(moment if moment.dim() == 2 else moment[0], rows.T @ rows / len(rows))
    name = next(k for k, m in layers(model).items() if isinstance(m, nn.Linear))
    weights = {r: quantize(model, [x], minmax, 4, None, r).model.get_parameter(f"{name}.weight")
               for r in ("nearest", "gptq")}  # fmt: skip
    W = copy.deepcopy(model).get_parameter(f"{name}.weight")
    errors = {r: ((found - W) @ moments[name]).mul(found - W).sum() for r, found in weights.items()}
    assert 0 < errors["gptq"] < errors["nearest"]
