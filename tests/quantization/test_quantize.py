"""A quantised copy of a model: what is rounded, what is said, and how methods compare on planted outliers."""

import copy
import statistics
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from test_invariances import FAMILIES, built, images
from torch import nn

from linzoo.backbones.layers import S6
from linzoo.quantization import MinMaxObserver, Quantizer, invariances, layers, tapped
from linzoo.quantization.quantize import (
    METHODS,
    mambaquant,
    minmax,
    quamba2,
    quantize,
    repq,
    simulate,
    smooth,
    weights_of,
)
from linzoo.quantization.reorder import clusters, scan_axes, sort_channels
from linzoo.quantization.taps import TappedAttention
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
    applies, needed = METHODS[method].applies
    if not applies(model):
        with pytest.raises(ValueError, match=f"method: {method} needs {needed}, got"):
            quantize(model, [images(torch.float64)], METHODS[method])
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(torch.float64)
    found = quantize(model, [x], METHODS[method], 16, 16)
    expected = model(x)
    limit = 0.1 if method == "repq" else 0.02  # a softmax takes powers of the square root of 2, however many bits
    assert relative(found.model(x), expected) < limit
    plain = timm.create_model(FAMILIES[family][0], num_classes=7, **FAMILIES[family][1]).double().eval()
    plain.load_state_dict(found.state_dict())
    assert 0 < relative(plain(x), expected) < limit
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@torch.no_grad()
@pytest.mark.parametrize(
    "family, method", [("vim", "mambaquant"), ("plain_nc_ssd", "quamba2"), ("kat", "repq"), ("vrwkv", "smooth")]
)
def test_simulation_in_another_model(family, method, tmp_path):
    """A file without code holds all that is rounded: an ordinary model then computes exactly the same."""
    model, x = copy.deepcopy(built(family)).float(), images(torch.float32)
    found = quantize(model, [x], METHODS[method])
    torch.save((found.state_dict(), found.simulation()), tmp_path / "q.pth")
    weights, simulation = torch.load(tmp_path / "q.pth", weights_only=True)
    plain = timm.create_model(FAMILIES[family][0], num_classes=7, **FAMILIES[family][1]).eval()
    plain.load_state_dict(weights)
    assert not torch.equal(plain(x), found.model(x))
    simulate(plain, simulation)
    assert torch.equal(plain(x), found.model(x))
    with pytest.raises(ValueError, match="simulation: expected that of 'Linear', got another"):
        simulate(nn.Linear(1, 1), simulation)
    assert not quantize(model, [x], METHODS[method], 8, None).simulation()


@torch.no_grad()
@pytest.mark.parametrize("family", ["vim", "vmamba", "vssd", "vrwkv", "groupmamba"])
def test_weights_and_inputs_lie_on_grids(family):
    """Every linear map: its weights take 2^4 values a row, its inputs 2^8 in all."""
    found = quantize(built(family), [images(torch.float64)], smooth, 4, 8)
    for weight, _ in weights_of(found.model, 4, found.method).values():
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
    """At W8A8, over three seeds: rotating online helps, smoothing and rotating helps more; each seed for itself."""
    rows = [outliers.errors(seed, 8) for seed in range(3)]
    naive, offline, online, _, both = ([row[name] for row in rows] for name in outliers.METHODS)
    for a, b, c in zip(naive, online, both, strict=True):
        assert a > b > c
    assert statistics.mean(offline) > 2 * statistics.mean(online)
    assert statistics.mean(online) > 2 * statistics.mean(both)


def test_what_applies():
    refused = {f: {m.name for m in METHODS.values() if not m.applies[0](built(f))} for f in FAMILIES}
    assert {f for f in FAMILIES if "quamba2" in refused[f]} == {
        *("groupmamba", "vrwkv", "vrwkv_norms", "vrwkv_post", "vrwkv6", "kat")
    }
    assert {f for f in FAMILIES if "repq" in refused[f]} == {"vrwkv_post"}
    assert all(found <= {"quamba2", "repq"} for found in refused.values())


@torch.no_grad()
def test_repq_rounds_attention():
    """The softmax takes powers of the square root of 2, and a hook leaves PyTorch's attention as it was."""
    model, x = built("kat"), images(torch.float64)
    found = quantize(model, [x], repq, 8, 8)
    names = {f"blocks.0.attn.{part}" for part in ("query", "key", "softmax", "value")}
    assert names <= set(found.ranges)
    seen = {}
    for module in found.model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(mode := getattr(hook, "__self__", None), TappedAttention):
                mode.show = lambda name, x, show=mode.show: seen.setdefault(name, show(name, x))
    found.model(x)
    a = seen["blocks.0.attn.softmax"]
    codes = -2 * (a[a > 0] / found.ranges["blocks.0.attn.softmax"][1]).log2()
    torch.testing.assert_close(codes, codes.round(), atol=1e-5, rtol=0)
    assert 2 < codes.unique().numel() <= 256
    assert torch.overrides._len_torch_function_stack() == 0
    with pytest.raises(RuntimeError):
        found.model(torch.zeros(1, 7, 64, 64, dtype=torch.float64))
    assert torch.overrides._len_torch_function_stack() == 0


def test_attention_with_a_mask():
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)
    shown = TappedAttention("a", lambda name, x: x)
    for given in (None, mask, torch.randn(5, 5, dtype=torch.float64)):
        expected = F.scaled_dot_product_attention(q, k, v, given, scale=0.3)
        torch.testing.assert_close(shown.attend(q, k, v, given, scale=0.3), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vmamba", "vssd"])
def test_quamba2_gives_clusters_ranges(family):
    """Channels rise in their heads; each cluster's values lie on a grid of its own."""
    model, x = copy.deepcopy(built(family)), images(torch.float64)
    expected, labels, means = model(x), sort_channels(model, [x]), {}
    assert relative(model(x), expected) < 1e-12

    def see(name, x):
        if name in labels:
            means[name] = x.abs().flatten(0, -2).mean(0)
        return x

    with tapped(model, see, scans=True):
        model(x)
    axes = scan_axes(model)
    assert labels and set(labels) == set(axes)
    for name, mean in means.items():
        rows = mean.view(axes[name].blocks, -1)
        assert (rows.diff(dim=1) >= 0).all() and labels[name].unique().numel() > 1
        assert (labels[name].view(rows.shape).diff(dim=1) >= 0).all()
    found = quantize(built(family), [x], quamba2, 4, 8)
    assert {name.rpartition(".")[2] for name in found.ranges} >= {"x", "B", "C"}
    for weight, quantizer in weights_of(found.model, 4, quamba2).values():
        assert quantizer.symmetric and (quantizer.granularity == "group") == (weight.shape[-1] % 128 == 0)


def test_clusters():
    statistic = torch.tensor([1.0, 1.1, 5, 5.1, 9, 9.1, 20, 21] * 2 + [1.0, 1, 1, 1, 1, 1, 1, 1])
    labels = clusters(statistic, blocks=3, heads=2, channels=4).view(3, 8)
    assert torch.equal(labels[0], labels[1]) and not set(labels[2].tolist()) & set(labels[0].tolist())
    assert labels[0].diff().bool().tolist() == [False, True, False, True, False, True, False]
    assert clusters(torch.tensor([1.0, 2.0])).tolist() == [0, 1]


def test_groups_of_weights_count_as_such():
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    found = quantize(model, [torch.randn(2, 256)], replace(minmax, symmetric=True, group=128), 4, None)
    assert found.size() == 256 * 8 // 2 + 8 * 16
    [(weight, quantizer)] = weights_of(found.model, 4, found.method).values()
    assert quantizer.group == 128 and all(part.unique().numel() <= 15 for part in weight.view(16, 128))
    plain = quantize(model, [torch.randn(2, 256)], replace(minmax, group=128), 8, None)
    assert plain.size() == 256 * 8 + 8 * 8
