"""Parameter groups of the optimizer."""

import pytest
import timm
from mmengine.model import BaseModel
from torch import nn

from linzoo.backbones.layers import LSSL, S4D
from linzoo.tools.engine import TimmWeightDecay


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
