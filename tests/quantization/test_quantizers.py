"""Rotations, observers, smoothing and simulated quantisers by themselves."""

import pytest
import torch

from linzoo.quantization import (
    BestRangeObserver,
    ChannelObserver,
    MinMaxObserver,
    PercentileObserver,
    Quantizer,
    best_range,
    block_hadamard,
    hadamard,
    has_hadamard,
    klt_rotation,
    log_sqrt2,
    rotation,
    smoothing,
)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 24, 28, 36, 48, 80, 96, 192, 348, 384, 448, 768])
def test_hadamard(n):
    H = hadamard(n)
    torch.testing.assert_close(H @ H.mT, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(H.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 92])
def test_orders_without_hadamard(n):
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"n: expected an order of a Hadamard matrix.*got {n}"):
        hadamard(n)


@pytest.mark.parametrize("n", [3, 6, 12, 92])
def test_rotations_are_orthogonal(n):
    eye = torch.eye(n, dtype=torch.float64)
    for R in (rotation(n), block_hadamard(n)):
        torch.testing.assert_close(R @ R.mT, eye, atol=1e-12, rtol=0)
    assert not torch.equal(rotation(n, 0), rotation(n, 1))
    assert torch.equal(rotation(n, 2), rotation(n, 2))


def test_klt_makes_variances_one():
    """The point of MambaQuant: a Hadamard matrix alone leaves the channels' variances unequal."""
    x = torch.randn(500, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64) + torch.randn(48)
    observer = ChannelObserver(covariance=True)
    observer.see(x[:200])
    observer.see(x[200:])
    torch.testing.assert_close(observer.covariance(), torch.cov(x.mT, correction=0))
    turned = (x @ klt_rotation(observer.covariance())).var(0)
    torch.testing.assert_close(turned, turned.mean().expand(48))
    alone = (x @ hadamard(48)).var(0)
    assert alone.max() / alone.mean() > 1.2


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "token", "group"])
def test_error_is_half_a_step(granularity, bits, symmetric):
    x = torch.randn(3, 5, 16, dtype=torch.float64) * torch.logspace(-1, 1, 16, dtype=torch.float64)
    quantizer = Quantizer(bits, symmetric, granularity, axis=-1, group=4)
    y = quantizer(x)
    low, high = quantizer.range(x)
    step, _ = quantizer.parameters(low, high)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert bool(((y - x).abs() <= 1.0001 * step * (0.5 if symmetric else 1)).all())
    for part in {"tensor": [y], "channel": y.unbind(-1), "token": [y[1, 2]], "group": [y[0, 0, 4:8]]}[granularity]:
        assert part.unique().numel() <= 2**bits
    assert {"tensor": 1, "channel": 16, "token": 15, "group": 60}[granularity] == step.unique().numel()
    torch.testing.assert_close(quantizer(y, (low, high)), y)
    assert torch.equal(quantizer(torch.zeros(2, 16)), torch.zeros(2, 16))


def test_static_range_cuts():
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    y = Quantizer(8)(torch.tensor([-3.0, 0.0, 0.5, 3.0]), (low, high))
    torch.testing.assert_close(y, torch.tensor([-1.0, 0.0, 0.5, 1.0]), atol=0.008, rtol=0)
    assert y[1] == 0


def test_finer_scales_err_less():
    x = torch.randn(64, 64) * torch.logspace(-2, 2, 64)
    tensor, token, group, channel = (
        float((Quantizer(8, granularity=kind, axis=-1, group=8)(x) - x).square().mean())
        for kind in ("tensor", "token", "group", "channel")
    )
    assert tensor > token > group and tensor > 5 * channel


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bits=1), "bits: expected 2 to 16, got 1"),
        (dict(granularity="row"), "granularity: expected tensor, channel, token or group, got 'row'"),
    ],
)
def test_wrong_quantizer(options, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(**options)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="group: expected a divisor of 10 channels, got 4"):
        Quantizer(granularity="group", group=4)(torch.ones(2, 10))
    with pytest.raises(ValueError, match="alpha: expected 0 to 1, got 2"):
        smoothing(torch.ones(2), torch.ones(2), 2)
    with pytest.raises(ValueError, match="share: expected more than 0.5"):
        PercentileObserver(0.1)
    with pytest.raises(ValueError, match="bins: expected a multiple of 4, got 6"):
        PercentileObserver(bins=6)
    for observer in (MinMaxObserver(Quantizer()), PercentileObserver()):
        with pytest.raises(ValueError, match="range: expected tensors to have been seen, got none"):
            observer.range()
    with pytest.raises(ValueError, match="maxima: expected tensors to have been seen"):
        ChannelObserver().maxima()
    with pytest.raises(ValueError, match="covariance: expected an observer with covariance=True"):
        ChannelObserver().covariance()


def test_observers_agree_with_all_at_once():
    x = torch.randn(10, 40, 6) * torch.arange(1, 11).view(10, 1, 1)
    seen, share = MinMaxObserver(Quantizer(granularity="channel", axis=-1)), PercentileObserver(0.99)
    for part in x:
        seen.see(part)
        share.see(part)
    low, high = seen.range()
    assert torch.equal(low.flatten(), x.amin((0, 1))) and torch.equal(high.flatten(), x.amax((0, 1)))
    low, high = share.range()
    width = 2 * share.reach / share.bins
    for found, wanted in ((low, x.quantile(0.01)), (high, x.quantile(0.99))):
        assert abs(found - wanted) < 4 * width
    assert share.counts.sum() == x.numel()


def test_groups_have_maxima_of_their_own():
    x = torch.randn(2, 7, 3, 5)
    observer = ChannelObserver(groups=True)
    observer.see(x)
    torch.testing.assert_close(observer.maxima(), x.abs().amax((0, 1)).double())


def test_best_range_leaves_outliers_out():
    x = torch.cat([torch.linspace(-1, 1, 20000), torch.tensor([10.0])])
    low, high = best_range(x, Quantizer(4))
    assert -1 <= low < -0.9 and 0.9 < high <= 1


def test_best_range_of_a_histogram():
    """It chooses as `best_range` does that sees all values."""
    x = torch.cat([torch.linspace(-1, 1, 20000), torch.tensor([10.0])])
    observer = BestRangeObserver(Quantizer(4))
    for part in x.chunk(3):
        observer.see(part)
    found, expected = observer.range(), best_range(x, Quantizer(4))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="range: expected tensors to have been seen"):
        BestRangeObserver(Quantizer(4)).range()


def test_smoothing_balances():
    """Behind it, activations and weights have the same maxima at alpha = 1 / 2."""
    a, w = torch.tensor([100.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    s = smoothing(a, w)
    torch.testing.assert_close((a / s)[:2], (w * s)[:2])
    assert s[2:].tolist() == [1, 1]
    assert smoothing(torch.tensor([1e-9]), torch.tensor([1.0])) == torch.tensor([1e-2])


def test_log_sqrt2():
    a = torch.tensor([1.0, 0.5, 2**-0.5, 0.26, 2**-7.5, 2**-8.2, 0.0])
    y = log_sqrt2(a, 1.0, bits=4)
    torch.testing.assert_close(y, torch.tensor([1.0, 0.5, 2**-0.5, 0.25, 2**-7.5, 0.0, 0.0]))
    many = torch.rand(1000).clamp(min=0.01)
    ratio = log_sqrt2(many, 1.0) / many
    assert ratio.min() >= 2**-0.2501 and ratio.max() <= 2**0.2501
