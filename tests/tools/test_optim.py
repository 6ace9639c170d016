"""Parameter groups of the optimizer."""

import pytest
import timm
from mmengine.model import BaseModel
from torch import nn

from linzoo.backbones.layers import LSSL, S4D
from linzoo.backbones.openmmlab import LinZooBackbone
from linzoo.tools.engine import InputError, LayerDecay, TimmWeightDecay


class Wrapped(BaseModel):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        raise NotImplementedError


def groups_of(model, lr):
    optimizer = dict(type="AdamW", lr=lr, weight_decay=0.05)
    wrapper = TimmWeightDecay(dict(type="OptimWrapper", optimizer=optimizer))(Wrapped(model))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len(names)
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("lr", (1e-2, 1e-4))
def test_state_spaces_learn_slowly_and_do_not_decay(lr):
    groups = groups_of(nn.Sequential(S4D(4, 8), LSSL(4, 8, learn=True), nn.Linear(4, 4)), lr)
    slow = (min(lr, 1e-3), 0.0)
    for name in ("A_log", "A_imag", "B", "log_dt"):
        assert groups[f"0.kernel.0.{name}"] == slow
    assert groups["1.log_dt"] == slow
    assert groups["1.A"] == groups["1.B"] == (min(lr, 1e-4), 0.0)
    assert groups["0.kernel.0.C"] == groups["2.weight"] == groups["1.C"] == (lr, 0.05)
    assert groups["2.bias"] == (lr, 0.0)


def test_frozen_parameters_and_models_without_hints():
    model = nn.Sequential(S4D(4, 8))
    model[0].kernel[0].B.requires_grad_(False)
    optimizer = dict(type="AdamW", lr=1e-2, weight_decay=0.05)
    groups = TimmWeightDecay(dict(type="OptimWrapper", optimizer=optimizer))(Wrapped(model)).optimizer.param_groups
    assert not any(p is model[0].kernel[0].B for g in groups for p in g["params"])
    groups = groups_of(timm.create_model("vmamba_t", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)), 1e-3)
    assert {lr for lr, _ in groups.values()} == {1e-3}


def detector_groups(backbone, **paramwise):
    """{name of the parameter: (learning rate, weight decay)} of a backbone with a head."""
    model = BaseModel.__new__(Wrapped)
    BaseModel.__init__(model)
    model.backbone, model.head = backbone, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4))
    wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05))
    groups = LayerDecay(wrapper, paramwise)(model).optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found), "every parameter once"
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


def test_layer_decay():
    """Rates rise by the same factor from layer to layer up to the heads', and nothing that should not decay does."""
    backbone = LinZooBackbone("vmamba_t", dict(dims=(8, 16, 32, 64), depths=(1, 1, 2, 1)), out_norm=True)
    groups = detector_groups(backbone, layer_decay=0.5)
    layers = ["stem.conv1"] + [
        f"stages.{i}.blocks.{j}.mixer.in_proj" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
    ]
    rates = [groups[f"backbone.model.{layer}.weight"][0] for layer in layers]
    assert rates == pytest.approx([1e-4 * 0.5 ** (6 - i) for i in range(6)])
    assert groups["backbone.model.stages.1.downsample.conv.weight"][0] == pytest.approx(rates[2])
    assert groups["head.0.weight"] == (1e-4, 0.05)
    assert groups["backbone.norms.3.weight"] == (1e-4, 0.0)
    assert groups["head.0.bias"] == groups["head.1.weight"] == (1e-4, 0.0)
    for name, (_, decay) in groups.items():
        last = name.rpartition(".")[2]
        kept = last in ("A_log", "D", "dt_bias", "bias") or "norm" in name or name.startswith("head.1")
        assert decay == (0.0 if kept else 0.05), name
    one = detector_groups(backbone)
    assert {lr for lr, _ in one.values()} == {1e-4}
    slower = detector_groups(backbone, backbone_lr_mult=0.1, layer_decay=0.5)
    for name, (rate, decay) in groups.items():
        factor = 0.1 if name.startswith("backbone.model.") else 1
        assert slower[name] == (pytest.approx(factor * rate), decay), name


@pytest.mark.parametrize("name", ("vrwkv_t", "vrwkv6_t", "vim_t", "groupmamba_t", "vrwkv_t_adapter_seg"))
def test_what_never_decays(name):
    small = dict(depth=4) if name[0] == "v" else dict(depths=(1, 1, 1, 1))
    for key, (_, decay) in detector_groups(LinZooBackbone(name, small), layer_decay=0.9).items():
        last = key.rpartition(".")[2]
        if last in ("A_log", "D", "dt_bias", "decay", "bias") or "norm" in key:
            assert decay == 0, key
        if key.endswith(("in_proj.weight", "value.weight", "fc1.weight")):
            assert decay == 0.05, key


def test_layer_decay_of_frozen_stages_and_bad_input():
    backbone = LinZooBackbone("vmamba_t", dict(dims=(8, 16, 32, 64), depths=(1, 1, 1, 1)), frozen_stages=1)
    assert not any("stem" in name or "stages.0" in name for name in detector_groups(backbone, layer_decay=0.9))
    with pytest.raises(InputError, match=r"layer_decay in \(0, 1\]"):
        detector_groups(backbone, layer_decay=1.5)
    with pytest.raises(InputError, match="backbone_lr_mult > 0"):
        detector_groups(backbone, backbone_lr_mult=0)
    with pytest.raises(InputError, match="layer_deca"):
        detector_groups(backbone, layer_deca=0.5)
