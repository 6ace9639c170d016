"""A quantised copy of a model: what is rounded, what is said, and how methods compare on planted outliers."""

import statistics

import pytest
import timm
import torch
from test_invariances import FAMILIES, built, images
from torch import nn

from linzoo.backbones.layers import S6
from linzoo.quantization import MinMaxObserver, Quantizer, invariances, layers, tapped
from linzoo.quantization.quantize import METHODS, mambaquant, minmax, quantize, smooth, weights_of
from linzoo.quantization.transforms import Online
from linzoo.tools import outliers


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_bits_change_nothing(family, method):
    """With 16 bits all that a method did to channels is exact, and what is written computes the same."""
    model = built(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(torch.float64)
    found = quantize(model, [x], METHODS[method], 16, 16)
    expected = model(x)
    assert relative(found.model(x), expected) < 0.02
    plain = timm.create_model(FAMILIES[family][0], num_classes=7, **FAMILIES[family][1]).double().eval()
    plain.load_state_dict(found.state_dict())
    assert 0 < relative(plain(x), expected) < 0.02
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@torch.no_grad()
@pytest.mark.parametrize("family", ["vim", "vmamba", "vssd", "vrwkv", "groupmamba"])
def test_weights_and_inputs_lie_on_grids(family):
    """Every linear map: its weights take 2^4 values a row, its inputs 2^8 in all."""
    found = quantize(built(family), [images(torch.float64)], smooth, 4, 8)
    for weight, _ in weights_of(found.model, 4):
        for row in weight.flatten(0, -2 if weight.dim() == 3 else 0).flatten(1):
            assert row.unique().numel() <= 16
    seen, quantizer = {}, Quantizer(8)

    def hook(name):
        def note(module, args):
            seen[name] = args[0]

        return note

    for name, module in layers(found.model).items():
        if isinstance(module, S6):
            inner = module.show
            module.show = lambda tap, x, inner=inner: seen.setdefault(tap, inner(tap, x))
        else:
            module.register_forward_pre_hook(hook(name))
    found.model(images(torch.float64)[:1] * 1.3)
    linear = {name for name, module in found.model.named_modules() if isinstance(module, nn.Linear)}
    assert linear <= set(seen) and set(found.ranges) == set(seen)
    for name, x in seen.items():
        assert x.unique().numel() <= 256, name
        low, high = (torch.tensor(value, dtype=torch.float64) for value in found.ranges[name])
        torch.testing.assert_close(quantizer(x, (low, high)), x)


def test_weights_alone():
    found = quantize(built("vmamba"), [images(torch.float64)], minmax, 8, None)
    assert not found.ranges and found.activation_bits is None
    assert not any(module._forward_pre_hooks for module in found.model.modules())


def test_size_is_that_of_the_bits():
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(3, 8, 3))
    size = 4 * (32 + 8 * 27 + 8)  # the bias and the dense convolution
    x = torch.randn(2, 64)
    for bits in (8, 4):
        copied = nn.Sequential(model[0])
        found = quantize(copied, [x], minmax, bits, 8)
        assert found.size() == 64 * 32 * bits // 8 + 8 * 32 + 4 * 32
    assert set(layers(model)) == {"0"} and size == sum(p.numel() for p in model.parameters()) * 4 - 4 * 64 * 32


def test_finer_bits_err_less():
    x = images(torch.float64)
    errors = [
        relative(quantize(built("vssd"), [x], mambaquant, bits, bits).model(x), built("vssd")(x))
        for bits in (4, 6, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 20


def test_online_hooks_come_first():
    """What an online rotation gives is what is rounded: the range is that of the rotated input."""
    x = images(torch.float64)
    found = quantize(built("vim"), [x], mambaquant)
    out = found.model.get_submodule("blocks.0.mixer.out_proj")
    assert [type(hook) for hook in out._forward_pre_hooks.values()][:-1] == [Online] * 2
    assert "blocks.0.mixer.s6.step" in found.ranges and not found.left


def test_scans_that_multiply_themselves_are_named():
    found = quantize(built("spatialmamba"), [images(torch.float64)], minmax)
    assert found.left and all(isinstance(found.model.get_submodule(name), S6) for name in found.left)


def test_taps_go_away():
    model, seen = built("vim"), []
    with tapped(model, lambda name, x: seen.append(name) or x):
        model(images(torch.float64))
    count = len(seen)
    model(images(torch.float64))
    assert len(seen) == count and count >= len(layers(model))
    assert type(model.blocks[0].mixer.s6) is S6 and not vars(model.blocks[0].mixer.s6).get("show")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((nn.Linear(4, 4), []), "images: expected at least one batch, got none"),
        ((nn.Linear(4, 4), [torch.ones(1, 4)], smooth), "method: smooth needs a family that declares invariances, got"),
        ((nn.Linear(4, 4), [torch.ones(1, 4)], minmax, 1), "bits: expected 2 to 16, got 1"),
        ((Unused(), [torch.ones(1, 4)], minmax), "model: no image reaches 'idle' of 'Unused'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)


def test_planted_outliers_are_seen():
    """They raise the largest values of the inputs that they are planted in, and hurt the naive method."""
    options = dict(img_size=64, depth=2)
    torch.manual_seed(0)
    model = timm.create_model("vim_t", **options).eval()
    x = outliers.digits(4, 64, 0)
    assert x.shape == (4, 3, 64, 64) and x.min() >= -1 and x.max() <= 1

    def largest(model):
        observers = {}

        def see(name, x):
            observers.setdefault(name, MinMaxObserver(Quantizer())).see(x)
            return x

        with torch.no_grad(), tapped(model, see):
            model(x)
        return {name: float(observer.range()[1]) for name, observer in observers.items()}

    before = largest(model)
    outliers.plant(model, 0)
    after = largest(model)
    for name in ("blocks.1.mixer.out_proj", "blocks.1.mixer.s6.step"):
        assert after[name] > 3 * before[name], name
    assert invariances(model)
    found = outliers.errors(0, 8, size=64, **options)
    assert found.keys() == outliers.METHODS.keys() and all(0 < error < 10 for error in found.values())


@pytest.mark.slow
def test_methods_in_order_on_outliers():
    """At W8A8, over five seeds: rotating online helps, smoothing and rotating helps more; each seed for itself."""
    rows = [outliers.errors(seed, 8) for seed in range(5)]
    naive, offline, online, _, both = ([row[name] for row in rows] for name in outliers.METHODS)
    for a, b, c in zip(naive, online, both, strict=True):
        assert a > b > c
    assert statistics.mean(offline) > 2 * statistics.mean(online)
    assert statistics.mean(online) > 2 * statistics.mean(both)
