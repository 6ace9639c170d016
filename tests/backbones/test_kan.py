"""KAN layers, the channel mixers by name, and models that take them in place of their MLPs."""

import pytest
import timm
import torch
from scipy.interpolate import BSpline
from sklearn.datasets import load_digits
from torch.nn import functional as F

import linzoo.backbones  # noqa: F401
from linzoo.backbones.layers import GRKAN, KAN, channel_mixer
from linzoo.backbones.layers.kan import CHANNEL_MIXERS, BSplineLinear, FourierLinear, b_splines

SMALL = dict(dims=(16, 32, 44, 64), depths=(1, 1, 1, 1), num_classes=10)


@pytest.mark.parametrize(("grid", "order"), ((5, 3), (4, 1), (3, 2)))
def test_b_splines(grid, order):
    x = torch.linspace(-1.7, 1.7, 101, dtype=torch.float64)
    basis = b_splines(x, grid, order)
    width = 2 / grid
    knots = [-1 + width * (i - order) for i in range(grid + 2 * order + 1)]
    for g in range(grid + order):
        expected = BSpline.basis_element(knots[g : g + order + 2], extrapolate=False)(x.numpy())
        torch.testing.assert_close(basis[:, g], torch.nan_to_num(torch.from_numpy(expected)))
    inside = (x >= -1) & (x < 1)
    torch.testing.assert_close(basis[inside].sum(-1), torch.ones(int(inside.sum()), dtype=torch.float64))


def test_edges_are_functions_of_one_input():
    x = torch.rand(7, 3, dtype=torch.float64) * 2 - 1
    layer = FourierLinear(3, 2, grid=4, dtype=torch.float64)
    g = torch.arange(1, 5)
    expected = sum(
        (layer.weight[:, i, 0] * (g * x[:, i, None, None]).cos()).sum(-1)
        + (layer.weight[:, i, 1] * (g * x[:, i, None, None]).sin()).sum(-1)
        for i in range(3)
    )
    torch.testing.assert_close(layer(x), expected + layer.bias)
    layer = BSplineLinear(3, 2, dtype=torch.float64)
    expected = F.linear(F.silu(x), layer.base.weight)
    expected = expected + torch.einsum("big,oig->bo", b_splines(x, 5, 3), layer.spline)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", CHANNEL_MIXERS)
def test_channel_mixers_take_each_others_place(name):
    mixer, x = channel_mixer(name)(12, 24, 16), torch.randn(2, 5, 12)
    y = mixer(x)
    assert y.shape == (2, 5, 16)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.cosine_similarity(mixer(x).float().flatten(), y.flatten(), dim=0) > 0.99
    assert channel_mixer(name)(12)(x).shape == x.shape


def test_unknown_mixer():
    with pytest.raises(ValueError, match="mlp: expected one of mlp, grkan, bspline_kan, fourier_kan, got 'kan'"):
        timm.create_model("vmamba_t", mlp="kan", **SMALL)
    with pytest.raises(ValueError, match="layer: expected one of bspline, fourier, got 'wavelet'"):
        KAN(4, layer="wavelet")


@pytest.mark.parametrize("name", ("groupmamba_t", "vmamba_t"))
@pytest.mark.parametrize("mlp", ("grkan", "bspline_kan", "fourier_kan"))
def test_models_learn_with_them(name, mlp):
    model = timm.create_model(name, mlp=mlp, **SMALL, **(dict(mlp_ratios=(2,) * 4) if name == "groupmamba_t" else {}))
    kinds = {type(block.mlp) for stage in model.stages for block in stage.blocks}
    assert kinds == {GRKAN if mlp == "grkan" else KAN}
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:32], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images, labels = F.interpolate(images, 32, mode="bicubic").expand(-1, 3, -1, -1), torch.tensor(labels[:32])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_grkan_keeps_its_variance_in_every_family():
    """The families' initialisation of linear maps, a std of 0.02, is not for those between rational functions."""
    for name in ("groupmamba_t", "vmamba_t"):
        model = timm.create_model(name, mlp="grkan", dims=(64, 128, 256, 512), depths=(1, 1, 1, 1))
        block = model.stages[1].blocks[0]
        assert abs(block.mlp.fc1.weight.std() * 128**0.5 - 1) < 0.05
        model.init_weights()
        assert abs(block.mlp.fc1.weight.std() * 128**0.5 - 1) < 0.05
    default = timm.create_model("groupmamba_t", mlp="grkan", device="meta")
    assert default.stages[2].blocks[0].mlp.act1.denominator.shape == (4, 4), "8 groups do not divide 348 channels"
