"""Plug-in modules: the published modules' values, and what they promise."""

import json
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import CecaModule, EcaModule
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from linzoo.backbones.layers import (
    SCSE,
    ChannelPatchEmbed,
    FDConv,
    TVConv,
    WaRA,
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    sample_channels,
)

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402


def load(name):
    case = json.loads((PARITY / "ops" / f"{name}.json").read_text())
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    return case, state, torch.from_numpy(synth.image(case["inputs"][0]["shape"], case["inputs"][0]["seed"]))


def assert_parity(case, ours, default=2e-4):
    by_name = {out["name"]: out for out in case["outputs"]}
    assert ours.keys() <= by_name.keys()
    for name, tensor in ours.items():
        out = by_name[name]
        where = slice(None) if out["index"] == "all" else out["index"]
        got, expected = tensor.detach().double().flatten()[where], torch.tensor(out["value"], dtype=torch.float64)
        assert list(tensor.shape) == out["shape"], name
        error = (got - expected).abs().max()
        assert error <= case.get("tolerance", default) * out["std"] + 1e-6, f"{name}: {error / out['std']:.1e}"


def under(prefix, state):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


FDCONV_NAMES = {
    "KSM_Global.relu.": "act.",
    "KSM_Global.": "",
    "KSM_Local.conv.": "local_conv.",
    "KSM_Local.norm.": "local_norm.",
    "FBM.freq_weight_conv_list.": "bands.weights.",
}


def fdconv_state(state):
    ours = {}
    for name, value in state.items():
        prefix = next((p for p in FDCONV_NAMES if name.startswith(p)), "")
        ours[FDCONV_NAMES.get(prefix, "") + name.removeprefix(prefix)] = value
    ours["dft_weight"] = ours["dft_weight"][0]
    return ours


def test_fdconv():
    case, state, x = load("op_fdconv")
    conv = FDConv(32, 48, 3, padding=1, kernel_num=8).eval()
    conv.load_state_dict(fdconv_state(state))
    group = conv.group.flatten()
    edges = torch.stack([torch.stack(order[[0, -1]].unbind()) for order in group_order(conv)])
    ours = {"y": conv(x), "y_small": conv(x[:, :, :8, :8]), "fbm": conv.bands(x)}
    assert_parity(case, ours | {"freq_group": group.view_as(conv.group), "freq_edges": edges})


def group_order(conv):
    """The flat indices of each group, by frequency."""
    rows, columns = conv.out_channels * conv.kernel_size, conv.in_channels * conv.kernel_size
    distance = torch.hypot(torch.fft.fftfreq(rows)[:, None], torch.fft.rfftfreq(columns)).flatten()
    order = distance.argsort(stable=True)
    return [order[conv.group.flatten()[order] == g] for g in range(conv.kernel_num)]


def test_fdconv_1x1():
    case, state, x = load("op_fdconv_1x1")
    conv = FDConv(64, 32, 1, bias=False, kernel_num=16).eval()
    conv.load_state_dict(fdconv_state(state))
    assert_parity(case, {"y": conv(x)})


def test_fdconv_begins_near_a_convolution():
    conv, weight = FDConv(24, 32, 3, padding=1, bias=False, kernel_num=4).eval(), torch.randn(32, 24, 3, 3)
    nn.init.zeros_(conv.filter_fc.weight)
    conv.copy_weight(weight)
    x = torch.randn(2, 24, 9, 7)
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, padding=1), rtol=1e-3, atol=1e-3)
    y = conv.train()(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in conv.parameters())
    fresh = FDConv(24, 32, 3, kernel_num=4, device="meta").to_empty(device="cpu")
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(fresh.group, conv.group) and fresh.eval()(x).isfinite().all()
    with pytest.raises(ValueError, match="expected more than 16 channels and a kernel of 1 or 3, got 16, 32 and 3"):
        FDConv(16, 32)
    with pytest.raises(ValueError, match="kernel_num: expected a divisor of 3552 coefficients, got 7"):
        FDConv(24, 32, 3, kernel_num=7)


def tvconv_state(state, prefix):
    ours = under(prefix, state)
    nets = (("weight_layers", "weight_net"), ("bias_layers", "bias_net"), ("posi_map", "positions"))
    for theirs, name in nets:
        ours = {key.replace(theirs, name): value for key, value in ours.items()}
    return ours


def test_tvconv():
    case, state, x = load("op_tvconv")
    first = TVConv(6, (9, 7), 3, 1, hidden=16, layers=1, bias=True)
    second = TVConv(6, (5, 4), 5, 2, position_channels=3, hidden=8, layers=2)
    for layer, prefix in ((first, "s1."), (second, "s2.")):
        layer.load_state_dict(tvconv_state(state, prefix))
    assert_parity(case, {"y": first(x), "y_k5_s2": second(x)})
    with pytest.raises(ValueError, match=r"x: expected an input whose output is \(9, 7\)"):
        first(x[:, :, :8])


def test_weighted_convolutions():
    case, state, x = load("op_wconv")
    convs = {
        "k3": WeightedConv2d(8, 12, 3, 2, 1, den=[0.7]),
        "k5": WeightedConv2d(8, 8, 5, padding=2, groups=4, bias=False, den=[0.2, 0.8]),
        "k7": WeightedConv2d(8, 4, 7, padding=3, trainable=True),
        "k3_3d": WeightedConv3d(2, 3, 3, padding=1, bias=False, den=[0.8]),
    }
    for name, conv in convs.items():
        missing, unexpected = conv.load_state_dict(under(f"{name}.", state), strict=False)
        assert set(missing) <= {"den"} and not unexpected
    y = {name: conv(x.view(2, 2, 4, 11, 10) if name == "k3_3d" else x) for name, conv in convs.items()}
    assert_parity(case, {"y_k3": y["k3"], "y_k5": y["k5"], "y_k7_trainable": y["k7"], "y_3d": y["k3_3d"]})
    y["k7"].sum().backward()
    assert convs["k7"].den.grad.abs().min() > 0
    line = WeightedConv1d(2, 2, 3, den=[0.5])
    torch.testing.assert_close(line.density(), torch.tensor([0.5, 1, 0.5]))
    assert torch.equal(WeightedConv2d(2, 2, 1).density(), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"den: expected 1 values for a kernel of 3, got \[1, 2\]"):
        WeightedConv2d(2, 2, 3, den=[1, 2])
    with pytest.raises(ValueError, match=r"kernel_size: expected equal odd sides, got \(3, 5\)"):
        WeightedConv2d(2, 2, (3, 5))


def test_eca_of_timm():
    """timm has ECA: what it computes is what was published."""
    case, state, x = load("op_eca")
    modules = {"eca": EcaModule(channels=64), "eca256": EcaModule(channels=256), "ceca": CecaModule(channels=64)}
    for name, module in modules.items():
        module.load_state_dict(under(f"{name}.", state))
    wide = x.repeat(1, 4, 1, 1) * torch.linspace(0.5, 1.5, 256)[:, None, None]
    ours = {"y": modules["eca"](x), "y_256": modules["eca256"](wide), "y_circular": modules["ceca"](x)}
    assert_parity(case, ours)


def test_scse():
    case, state, x = load("op_scse")
    names = {"scse.cSE.fc1.": "fc1.", "scse.cSE.fc2.": "fc2.", "scse.sSE.conv.": "conv."}
    ours = {ours + k: v for theirs, ours in names.items() for k, v in under(theirs, state).items()}
    results = {}
    for combine in ("max", "sum"):
        layer = SCSE(16, combine=combine)
        layer.load_state_dict(ours)
        results[f"y_{combine}"] = layer(x)
    results["cse"], results["sse"] = layer.gated(x)
    assert_parity(case, results)
    with pytest.raises(ValueError, match="combine: expected 'max' or 'sum', got 'mean'"):
        SCSE(16, combine="mean")


def channelvit():
    case, state, x = load("op_channelvit")
    embed = ChannelPatchEmbed(32, 8, 5, 24).eval()
    embed.load_state_dict(
        {
            "cls_token": state["cls_token"],
            "pos_embed": state["pos_embed"],
            "proj.weight": state["patch_embed.proj.weight"][:, :, 0],
            "proj.bias": state["patch_embed.proj.bias"],
            "channel_embed": state["patch_embed.channel_embed.weight"],
        }
    )
    norm = nn.LayerNorm(24, eps=1e-6)
    norm.load_state_dict(under("norm.", state))
    blocks = nn.Sequential(
        *(Block(24, 3, qkv_bias=True, norm_layer=lambda dim, **kw: nn.LayerNorm(dim, eps=1e-6, **kw)) for _ in range(2))
    )
    blocks.load_state_dict(under("blocks.", state))
    return case, x, embed, lambda tokens: norm(blocks(tokens))[:, 0]


def test_channel_patch_embed():
    case, x, embed, classify = channelvit()
    ours = {"tokens": embed(x), "tokens_3of5": embed(x[:, [4, 0, 2]], [4, 0, 2])}
    ours["tokens_40x48"] = embed(F.pad(x, (0, 16, 0, 8)))
    one = embed(x[:, 3:4], [3])
    ours |= {"cls": classify(ours["tokens"]), "cls_3of5": classify(ours["tokens_3of5"]), "cls_1of5": classify(one)}
    assert_parity(case, ours)


def test_hierarchical_channel_sampling():
    counts, kept = [], []
    for _ in range(2000):
        chosen = sample_channels(4)
        assert len(set(chosen)) == len(chosen) and set(chosen) <= set(range(4))
        counts.append(len(chosen))
        kept += chosen
    assert all(400 < counts.count(m) < 600 for m in range(1, 5)), "the number is uniform"
    assert all(1050 < kept.count(c) < 1450 for c in range(4)), "and so are the channels"
    embed, x = ChannelPatchEmbed(16, 8, 4, 6), torch.randn(2, 4, 16, 16)
    assert {embed(x).shape[1] for _ in range(60)} == {1 + 4 * m for m in range(1, 5)}
    assert embed.eval()(x).shape[1] == 17
    with pytest.raises(ValueError, match=r"channels: expected 4 indices below 4 .* got \[0, 1, 2, 4\]"):
        embed(x, [0, 1, 2, 4])


def test_wara():
    case, state, x = load("op_wara")
    layer = WaRA(nn.Linear(12, 8), rank=3)
    layer.load_state_dict({"A": state["A_w"], "B": state["B_w"]}, strict=False)
    tokens = x.transpose(1, 2)
    bands = layer.bands(tokens)
    ours = {"dX": layer.update(tokens).transpose(1, 2), "dW": layer.delta()}
    ours |= {"LL": bands[0].transpose(1, 2), "HL": bands[2].transpose(1, 2)}
    assert_parity(case, ours)
    gained = WaRA(nn.Linear(12, 8), rank=3, gains=True)
    gained.load_state_dict({"A": state["A_w"], "B": state["B_w"]}, strict=False)
    torch.testing.assert_close(gained.update(tokens), layer.update(tokens))
    assert gained.update(tokens[:, :7]).shape == (2, 7, 8)
    with pytest.raises(ValueError, match="gains: with a gain per band the update is no matrix"):
        gained.delta()


def test_wara_adapts_a_frozen_map():
    linear, x = nn.Linear(12, 8), torch.randn(3, 12)
    layer = WaRA(linear, rank=2, alpha=4)
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias))
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight + layer.delta(), linear.bias))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
    with pytest.raises(ValueError, match="linear: expected even numbers of features"):
        WaRA(nn.Linear(3, 4))
