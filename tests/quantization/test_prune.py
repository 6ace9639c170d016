"""Pruning: what goes, what stays, and by which scores."""

import copy

import pytest
import timm
import torch
from test_invariances import FAMILIES, built, images
from torch import nn

from linzoo.quantization.prune import KINDS, PRUNINGS, dimap_scores, prunable, prune, sparsity


def test_scores_are_shares_of_what_is_left():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[1.0, 1 / 14], [4 / 13, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(dimap_scores(weight), expected)
    torch.testing.assert_close(dimap_scores(5 * weight), expected)
    assert torch.equal(dimap_scores(torch.zeros(2, 2)), torch.zeros(2, 2, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("family", ["vim", "vmamba", "groupmamba", "vssd", "vrwkv", "kat", "localvmamba"])
@pytest.mark.parametrize("method", PRUNINGS[:2])
def test_kinds_have_the_ratio(family, method):
    model = copy.deepcopy(built(family))
    names = prune(model, method, 0.3)
    before = built(family).state_dict()
    for key, x in model.state_dict().items():
        assert key in names or torch.equal(x, before[key]), key
        kept = x != 0
        assert torch.equal(x[kept], before[key][kept])
    found = sparsity(model)
    assert found["all else"][0] == 0 and found["all"][1] == sum(p.numel() for p in model.parameters())
    for kind, modules in prunable(model).items():
        zeros, count = found[kind]
        assert abs(zeros / count - 0.3) < 0.01, kind
        shares = [float((m.weight == 0).double().mean()) for m in modules.values()]
        if method == "magnitude":
            assert all(abs(share - 0.3) < 2e-3 for share in shares)
        else:
            assert len(shares) == 1 or len(set(shares)) > 1, "one threshold for all"
    assert model(images(torch.float64)).isfinite().all()


def test_families_have_these_kinds():
    kinds = {family: set(prunable(built(family))) for family in ("vim", "vmamba", "vrwkv", "vssd", "kat")}
    assert kinds.pop("vim") == set(KINDS) - {"channel mixers"} and all(k == set(KINDS) for k in kinds.values())
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    names = {name for modules in prunable(swin).values() for name in modules}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"layers.{i}.blocks.0.{part}" for i in range(4) for part in parts}


@torch.no_grad()
@pytest.mark.parametrize("family", ["vim", "vssd", "vrwkv", "vmamba_v0", "mambavision"])
def test_channels_go_whole(family):
    """Whole columns of the output projections are 0, and an ordinary model takes the weights."""
    model = copy.deepcopy(built(family))
    prune(model, "channels", 0.25)
    x = images(torch.float64)
    expected = model(x)
    assert expected.isfinite().all() and not torch.allclose(expected, built(family)(x))
    for name, module in prunable(model)["mixers' outputs"].items():
        gone = (module.weight == 0).all(0)
        assert 0.24 < gone.double().mean() < 0.26, name
        assert not (module.weight[:, ~gone] == 0).any()
    fresh = timm.create_model(FAMILIES[family][0], num_classes=7, **FAMILIES[family][1]).double().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((nn.Linear(2, 2), "dimap", 0.5), "model: expected projections of mixers or MLPs, got none in Linear"),
        ((nn.Linear(2, 2), "channels", 0.5), "model: expected a family that declares inner channels, got Linear"),
        ((nn.Linear(2, 2), "random", 0.5), "method: expected magnitude, dimap, channels, got 'random'"),
        ((nn.Linear(2, 2), "dimap", 1.0), "ratio: expected more than 0 and less than 1, got 1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(*arguments)
