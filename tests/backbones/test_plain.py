"""Plain ViTs and their token mixers: what is alike, what sees what, RWKV-7's recurrence, bad input."""

import pytest
import timm
import torch
import torch.nn.functional as F

from linzoo.backbones import list_models
from linzoo.backbones.layers import SpatialMix7, TokenMixer
from linzoo.backbones.layers.state_tuning import tune_states
from linzoo.backbones.layers.token_mixer import TOKEN_MIXERS
from linzoo.backbones.plain import MIXERS, PlainMixer


def test_names():
    assert set(list_models("plain_*")) - set(list_models("plainmamba*")) == {
        f"plain_{m}_{s}" for m in MIXERS for s in "ts"
    }


def test_the_mixers_are_all_that_differs():
    """Names and shapes beside the mixers; the channel mixer of GR-KAN is its own."""
    rest = {}
    for mixer in MIXERS:
        model = timm.create_model(f"plain_{mixer}_t", depth=2, device="meta")
        state = {k: tuple(v.shape) for k, v in model.state_dict().items() if ".mixer." not in k}
        rest[mixer] = {k: shape for k, shape in state.items() if mixer != "grkan" or ".mlp." not in k}
    assert all(rest[m] == rest["attention"] for m in TOKEN_MIXERS)
    assert rest["grkan"] == {k: shape for k, shape in rest["attention"].items() if ".mlp." not in k}


@pytest.mark.parametrize("mixer", MIXERS)
def test_learns(mixer):
    """Every parameter has a gradient, on an image that is not square and of another size than the positions."""
    model = timm.create_model(f"plain_{mixer}_t", depth=2, num_classes=3, img_size=48)
    y = model(torch.randn(2, 3, 33, 70))
    assert y.shape == (2, 3)
    F.cross_entropy(y, torch.tensor([0, 2])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", TOKEN_MIXERS)
@pytest.mark.parametrize("layer", (0, 1))
def test_maps_to_the_same_shape_and_sees_everything(name, layer):
    """The mixer of one direction sees what is before it, in the next layer what is behind it."""
    torch.manual_seed(0)
    mixer = TokenMixer(name, 64, layer, 2).double().eval()
    x = torch.randn(1, 5, 7, 64, dtype=torch.float64, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    ends = {}
    for place, at in (("first", (0, 0)), ("last", (4, 6))):
        (grad,) = torch.autograd.grad(y[0, at[0], at[1]].square().sum(), x, retain_graph=True)
        ends[place] = grad[0].abs().amax(-1)
    behind, before = ends["first"][4, 6] > 0, ends["last"][0, 0] > 0
    assert (before, behind) == ((layer == 0, layer == 1) if name == "mlstm" else (True, True))


def test_wkv7_by_its_recurrence():
    """The equations of the paper step by step, from both ends."""
    torch.manual_seed(0)
    grid, mixer = (3, 4), SpatialMix7(128, 1, 3).double()
    with torch.no_grad():
        for p in (mixer.decay_down, mixer.rate_down, mixer.gate_down, mixer.bonus, mixer.rate):
            p.normal_(std=0.3)
    z = torch.randn(2, 12, 128, dtype=torch.float64)
    x = z.view(2, *grid, 2, 4, 16)  # heads, and the quarters of each
    shifted = torch.zeros_like(x)
    shifted[:, :, 1:, :, 0], shifted[:, :, :-1, :, 1] = x[:, :, :-1, :, 0], x[:, :, 1:, :, 1]
    shifted[:, 1:, :, :, 2], shifted[:, :-1, :, :, 3] = x[:, :-1, :, :, 2], x[:, 1:, :, :, 3]
    r, w, k, v, a, g = (z + (shifted.reshape(z.shape) - z) * mu for mu in mixer.mix)
    decay = torch.exp(
        -torch.exp(torch.tensor(-0.5)) * torch.sigmoid(mixer.decay + (w @ mixer.decay_down).tanh() @ mixer.decay_up)
    )
    rate = torch.sigmoid(mixer.rate + a @ mixer.rate_down @ mixer.rate_up)
    gate = torch.sigmoid(g @ mixer.gate_down) @ mixer.gate_up
    r, k, v = r @ mixer.receptance.weight.T, k @ mixer.key.weight.T, v @ mixer.value.weight.T
    erase = F.normalize((k * mixer.removal).view(2, 12, 2, 64), dim=-1)
    k = k * (1 + (rate - 1) * mixer.write)
    r, k, v, decay, rate = (t.reshape(2, 12, 2, 64) for t in (r, k, v, decay, rate))
    y = torch.zeros_like(v)
    for steps in (range(12), reversed(range(12))):
        S = z.new_zeros(2, 2, 64, 64)  # values, keys
        for t in steps:
            removed = torch.einsum("bhpn,bhn->bhp", S, -erase[:, t])
            S = S * decay[:, t, :, None] + removed[..., None] * (rate * erase)[:, t, :, None]
            S = S + v[:, t, :, :, None] * k[:, t, :, None]
            y[:, t] += torch.einsum("bhpn,bhn->bhp", S, r[:, t])
    y = F.group_norm(y.reshape(24, 128), 2, mixer.norm.weight, mixer.norm.bias, 64e-5).view(2, 12, 2, 64)
    y = y + (r * k * mixer.bonus).sum(-1, keepdim=True) * v
    expected = (y.reshape(2, 12, 128) * gate) @ mixer.output.weight.T
    torch.testing.assert_close(mixer(z, grid), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mixer", ("wkv6", "wkv7"))
def test_states_can_be_tuned(mixer):
    """States of 0 change nothing; they learn, and nothing else does."""
    model = timm.create_model(f"plain_{mixer}_t", depth=2, img_size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
    tune_states(model, head=False)
    y = model(x)
    torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {f"blocks.{i}.mixer.mixer.time_state" for i in range(2)}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in learns)


def test_bad_arguments():
    with pytest.raises(ValueError, match="mixer: expected one of attention, .*, got 'conv'"):
        PlainMixer(mixer="conv")
    with pytest.raises(ValueError, match="mixer: expected one of attention, .*, got 'grkan'"):
        TokenMixer("grkan", 64)
    with pytest.raises(ValueError, match="dim: expected a multiple of 64, got 96"):
        PlainMixer(dim=96)
