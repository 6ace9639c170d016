"""What a family declares is true: every transform of every axis leaves the model's outputs as they were."""

import copy
import functools

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

from linzoo.quantization import (
    Quantizer,
    fold_ranges,
    invariances,
    measure,
    permute,
    remove_online,
    rotate,
    rotation,
    scale,
    shift,
)

VIM = dict(img_size=64, depth=2, dim=48)
PYRAMID = dict(dims=(16, 24, 32, 48), depths=(1, 1, 1, 1))
RWKV = dict(img_size=64, depth=2, dim=64)
ROUTES = (("h h_flip w7 w7_flip",), ("h v w2 w2_flip",), ("h h_flip v v_flip",), ("h v_flip w2 w7",))
FAMILIES = {
    "vim": ("vim_t", VIM),
    "vim_avg": ("vim_t", dict(VIM, global_pool="avg")),
    "vmamba": ("vmamba_t", PYRAMID),
    "vmamba_v0": ("vmamba_t_v0", PYRAMID),
    "groupmamba": ("groupmamba_t", dict(PYRAMID, stem_width=8, dims=(32, 32, 64, 64))),
    "efficientvmamba": ("efficientvmamba_t", PYRAMID),
    "localvmamba": ("local_vssm_t", dict(dims=PYRAMID["dims"], routes=ROUTES)),
    "mambavision": ("mambavision_t", dict(dim=16, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(7, 7))),
    "mambavision_reorder": (
        "mambavision_t_reorder",
        dict(dim=16, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(7, 7), reorder="hard", init_values=0.5),
    ),
    "vssd": ("vssd_m", dict(depths=(1, 1, 1, 1), dim=32, d_state=16)),
    "spatialmamba": ("spatialmamba_t", dict(depths=(1, 1, 1, 1), dim=32)),
    "vrwkv": ("vrwkv_t", RWKV),
    "vrwkv_norms": ("vrwkv_t", dict(RWKV, inner_norm=True, init_values=0.1)),
    "vrwkv_post": ("vrwkv_t", dict(RWKV, post_norm=True)),
    "plain_ss2d": ("plain_ss2d_t", dict(img_size=64, depth=2, dim=64)),
    "plain_nc_ssd": ("plain_nc_ssd_t", dict(img_size=64, depth=2, dim=64)),
    "vrwkv6": ("vrwkv6_t", RWKV),
    "videomamba": ("videomamba_t", dict(img_size=64, depth=2)),
    "kat": ("kat_tiny_patch16_224", dict(img_size=64, depth=2)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
both = pytest.mark.parametrize("dtype", TOLERANCE)


@functools.cache
def built(family):
    """A small model in float64 without a parameter that is 0 or 1."""
    name, options = FAMILIES[family]
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def images(dtype):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@torch.no_grad()
def error(changed, model):
    x = images(next(model.parameters()).dtype)
    expected = model(x)
    assert expected.std() > 1e-4
    return float((changed(x) - expected).abs().max() / expected.abs().max())


def some(axis, model, move):
    """A transform of the kind that an axis allows, random but for the seed."""
    groups = (model.get_parameter(axis.slots[0].name).shape[0],) if axis.grouped else ()
    if move == "scale":
        return torch.rand(*groups, axis.size, dtype=torch.float64) + 0.5
    width = axis.size // axis.blocks
    if move == "permute":
        return torch.cat([torch.arange(width).roll(1 + width // 3) + i * width for i in range(axis.blocks)])
    R = torch.block_diag(*[rotation(width, seed) for seed in range(axis.blocks)])
    return R.expand(*groups, -1, -1)


@both
@pytest.mark.parametrize("move", [scale, rotate, permute])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_stay(family, move, dtype):
    model = copy.deepcopy(built(family)).to(dtype)
    axes = [axis for axis in invariances(model) if move.__name__ in axis.moves]
    if not axes:
        pytest.skip(f"{family} declares nothing that {move.__name__} may do")
    changed = copy.deepcopy(model)
    for axis in axes:
        before = {slot.name: changed.get_parameter(slot.name).clone() for slot in axis.slots}
        move(changed, axis, some(axis, changed, move.__name__))
        if axis.size > 1:
            assert any(not torch.equal(changed.get_parameter(key), x) for key, x in before.items()), axis.name
    assert error(changed, model) < TOLERANCE[dtype]
    assert changed.state_dict().keys() == model.state_dict().keys()


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_and_back(family, dtype):
    """Transforms on top of each other; without the hooks the weights are those of an ordinary model."""
    model = copy.deepcopy(built(family)).to(dtype)
    changed = copy.deepcopy(model)
    for move in (scale, rotate, permute):
        for axis in invariances(changed):
            # A permutation of the channels would leave behind what the hook before `out_proj` does to them.
            if move.__name__ in axis.moves and not (move is permute and axis.name.endswith((".channels", ".beside"))):
                move(changed, axis, some(axis, changed, move.__name__))
    assert error(changed, model) < TOLERANCE[dtype]
    remove_online(changed)
    assert error(changed, model) < TOLERANCE[dtype]
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(changed.state_dict())
    assert error(fresh, model) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_axis_has_its_channels(family):
    """Slots lie inside their parameters, and a tap shows as many channels as the axis has."""
    model = built(family)
    axes = invariances(model)
    assert len({axis.name for axis in axes}) == len(axes)
    for axis in axes:
        for slot in axis.slots:
            assert slot.start + axis.size <= model.get_parameter(slot.name).shape[slot.dim], (axis.name, slot)
    seen = measure(model, axes, [images(torch.float64)])
    for axis in axes:
        if axis.tap and seen[axis.name].largest is not None:
            assert seen[axis.name].maxima().shape[-1] == axis.size, axis.name
    assert any(observer.largest is not None for observer in seen.values())


def test_what_is_declared():
    names = {axis.name for axis in invariances(built("vim"))}
    assert {"stream", "blocks.0.norm", "blocks.0.mixer.online", "blocks.1.mixer.s6.step"} <= names
    assert invariances(nn.Sequential(nn.Linear(2, 2))) == []
    assert [axis.moves for axis in invariances(nn.Sequential(Mlp(4)))] == [{"permute"}]
    # These mixers add to B or C, or compute them of other inputs, so that their scans' states may not be scaled.
    assert not any(invariances(timm.create_model(name)) for name in ("plainmamba_l1", "vim2_t"))


@both
@pytest.mark.parametrize("family", ["vmamba", "vssd", "mambavision", "vrwkv", "kat"])
def test_repq_fold_keeps_outputs(family, dtype):
    model = copy.deepcopy(built(family)).to(dtype)
    changed, shifted = copy.deepcopy(model), []
    for axis in invariances(model):
        if ".norm" in axis.name:
            low, high = torch.rand(2, axis.size, dtype=torch.float64) + 0.5
            shifted.append(fold_ranges(changed, axis, -low, high, Quantizer(8)))
    assert error(changed, model) < TOLERANCE[dtype]
    assert any(shifted) == (family != "vrwkv")


def test_repq_fold_makes_ranges_one():
    """Behind it, all channels take the same range: a quantiser per tensor is one per channel."""
    model = copy.deepcopy(built("kat"))
    [axis] = [axis for axis in invariances(model) if axis.name == "blocks.0.norm1"]
    seen = []
    norm = model.get_submodule("blocks.0.norm1")
    norm.register_forward_hook(lambda module, args, y: seen.append(y))
    model(images(torch.float64))
    low, high = seen[-1].flatten(0, 1).amin(0), seen[-1].flatten(0, 1).amax(0)
    assert fold_ranges(model, axis, low, high, Quantizer(8))
    model(images(torch.float64))
    width = seen[-1].flatten(0, 1).amax(0) - seen[-1].flatten(0, 1).amin(0)
    torch.testing.assert_close(width, width.mean().expand_as(width))
    step = (high - low) / 255
    lowest = seen[-1].flatten(0, 1).amin(0)
    torch.testing.assert_close(lowest, lowest.mean().expand_as(lowest))
    assert (high - low).std() > step.mean()


def test_wrong_transforms_change_nothing():
    model = copy.deepcopy(built("vim"))
    before = copy.deepcopy(model.state_dict())
    axes = {axis.name: axis for axis in invariances(model)}
    stream, step, conv = axes["stream"], axes["blocks.0.mixer.s6.step"], axes["blocks.0.mixer.conv"]
    heads = next(axis for axis in invariances(built("vssd")) if axis.blocks > 1)
    for wrong, message in (
        (lambda: scale(model, stream, torch.ones(48)), "axis: expected one that allows 'scale'"),
        (lambda: scale(model, conv, torch.zeros(96)), "s: expected positive numbers"),
        (lambda: scale(model, conv, torch.ones(5)), r"s: expected the shape \(96,\)"),
        (lambda: rotate(model, step, torch.eye(3)), r"R: expected the shape \(2, 3, 3\)"),
        (lambda: rotate(model, stream, torch.ones(48, 48)), "R: expected an orthogonal matrix"),
        (lambda: permute(model, stream, torch.zeros(48).long()), "order: expected a permutation of 48"),
        (lambda: permute(built("vssd"), heads, torch.arange(heads.size).flip(0)), "order: expected channels"),
        (lambda: shift(model, conv, torch.ones(96)), "axis: expected one between a LayerNorm"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
