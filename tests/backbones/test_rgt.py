"""RGT: the authors' values, windows, reductions, images of any size."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, restored, synth

from linzoo.backbones import list_models
from linzoo.backbones.layers.checkpoint import rename, reshape_as
from linzoo.backbones.rgt import LSA, RGSA, RGSA_NAMES, PositionBias

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "rgt").glob("*.json"))}
SMALL = dict(dim=96, depths=(2, 4), num_heads=2, window=(4, 8))
NAMES = list_models("rgt*", kind="restoration")


def small(name, **kwargs):
    return timm.create_model(name, **dict(SMALL, **kwargs))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small("rgt_s_x3").eval()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rgt")])
def test_parity(name, tmp_path):
    case = CASES[name]
    images = [(0.5 + 0.25 * torch.from_numpy(synth.image(i["shape"], i["seed"]))).clamp(0, 1) for i in case["inputs"]]
    y, maps = restored(case, images, tmp_path)
    found = maps | {"sr": y}
    for out in case["outputs"]:
        assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("op_")])
def test_rgsa_parity(name):
    case, layer = CASES[name], RGSA(180, 6).eval()
    state = {rename(k, RGSA_NAMES): torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    layer.load_state_dict(reshape_as(state, layer))
    assert sum(p.numel() for p in layer.parameters()) == case["num_params"]
    [tokens] = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    with torch.inference_mode():
        y = layer(tokens.unflatten(1, case["forward"]["size"]))
    assert error(y.flatten(1, 2), case["outputs"][0]) <= 2e-4


def test_number_of_reductions():
    layer = RGSA(8, 2)
    for training, sizes in (
        (False, {(16, 16): 2, (64, 64): 2, (1023, 70): 2, (1024, 64): 3, (300, 4096): 4}),
        (True, {(15, 4): 0, (16, 20): 1, (63, 63): 1, (64, 64): 2, (16, 255): 2, (256, 64): 3}),
    ):
        layer.train(training)
        assert {size: layer.reductions(*size) for size in sizes} == sizes
    layer.eval()
    for size, n in (((15, 100), 2), ((1024, 48), 3)):
        with pytest.raises(
            ValueError, match=f"x: a map of {size[0]} x {size[1]} is reduced {n} times .* {4**n} at least"
        ):
            layer(torch.zeros(1, *size, 8))


def test_windows():
    """A token of the first half sees its flat window, one of the second its tall one, shifted or not."""
    for shift in (False, True):
        torch.manual_seed(0)
        layer, x = LSA(64, 2, (4, 8), shift).eval(), torch.randn(1, 16, 16, 64)
        layer.proj = torch.nn.Identity()
        torch.nn.init.zeros_(layer.conv.weight)
        x.requires_grad_()
        for half, rows, columns in (
            (slice(32), (4, 8), (0, 8)) if not shift else (slice(32), (2, 6), (4, 12)),
            (slice(32, 64), (0, 8), (4, 8)) if not shift else (slice(32, 64), (4, 12), (2, 6)),
        ):
            [gradient] = torch.autograd.grad(layer(x)[0, 5, 5, half].sum(), x)
            seen = gradient.abs().sum(-1)[0] > 1e-9
            expected = torch.zeros_like(seen)
            expected[slice(*rows), slice(*columns)] = True
            assert torch.equal(seen, expected), (shift, half)
        if shift:  # in the corner, what the roll brought in from the other sides is not seen
            [gradient] = torch.autograd.grad(layer(x)[0, 0, 0, :32].sum(), x)
            seen = gradient.abs().sum(-1)[0] > 1e-9
            assert seen[:2, :4].all() and seen.sum() == 8


def test_position_bias_is_of_the_offset():
    bias = PositionBias((2, 3), 4, 5)()
    assert bias.shape == (4, 6, 6)
    tokens = [(y, x) for y in range(2) for x in range(3)]
    by_offset = {}
    for i, (y, x) in enumerate(tokens):
        for j, (v, u) in enumerate(tokens):
            first = by_offset.setdefault((y - v, x - u), bias[:, i, j])
            torch.testing.assert_close(bias[:, i, j], first)
    assert len(by_offset) == 15 and torch.stack(list(by_offset.values())).std(0).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_channels(name):
    model, scale = small(name, device="meta").eval(), int(name[-1])
    assert model(torch.empty(1, 3, 16, 24, device="meta")).shape == (1, 3, 16 * scale, 24 * scale)
    assert model.scale == scale


@pytest.mark.parametrize("size", [(16, 16), (19, 45)])
def test_any_size(model, size):
    x = torch.rand(2, 3, *size)
    with torch.inference_mode():
        y = model(x)
        assert y.shape == (2, 3, *(3 * n for n in size))
        assert y.isfinite().all() and y.std() > 0
        torch.testing.assert_close(model(x[:1]), y[:1], rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(model):
    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.train()
    x = torch.rand(2, 3, 20, 24)
    still = ("attn.k.bias", ".mlp.9.bias")  # softmax does not see what all keys share
    plain = gradients()
    assert [n for n, g in plain.items() if not (g.isfinite().all() and g.any()) and not n.endswith(still)] == []
    model.set_grad_checkpointing(True)
    for name, g in gradients().items():
        torch.testing.assert_close(g, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_init_weights_after_to_empty():
    empty = small("rgt_x2", device="meta").to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert empty.eval()(torch.rand(1, 3, 16, 16)).isfinite().all()


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"x: expected \(B, 3, H, W\), got \(1, 4, 16, 16\)"):
        model(torch.rand(1, 4, 16, 16))
    with pytest.raises(ValueError, match="scale: expected 1, 2, 3 or 4, got 5"):
        small("rgt_x2", scale=5)


@pytest.mark.slow
def test_compile_and_export(model):
    """One exported program at two sizes."""
    x = torch.rand(1, 3, 40, 48)  # no map of a single row behind the reductions: export takes a 1 for a constant
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    sides = {2: 8 * torch.export.Dim("h", min=4, max=64), 3: 8 * torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes={"x": sides}).module()
    for size in ((40, 48), (64, 40)):
        x = torch.rand(1, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
