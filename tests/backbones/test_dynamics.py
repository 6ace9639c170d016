"""Token dynamics: sorted scans, projections of one sign, and what `state_eigenvalues` reads off a model."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn.utils import parametrize

import linzoo.backbones  # noqa: F401
from linzoo.backbones.layers import S6, SoftSort, definite_projection
from linzoo.backbones.layers.dynamics import SIGNS, scans_of, state_eigenvalues
from linzoo.backbones.layers.mamba import MambaMixer
from linzoo.backbones.mambavision import MambaVisionMixer, checkpoint_filter_fn

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402
from test_parity import error  # noqa: E402


def case_of(name):
    case = json.loads((PARITY / "dynamics" / f"{name}.json").read_text())
    state = {key: torch.from_numpy(value) for key, value in synth.state_dict(case).items()}
    return case, state, {out["name"]: out for out in case["outputs"]}


@pytest.mark.parametrize("grad", [False, True])
def test_sorted_mixer(grad):
    """Soft and hard; the hard one also where the scan walks by `order` and nothing is multiplied."""
    case, state, outputs = case_of("op_token_reorder")
    [x] = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    ours = checkpoint_filter_fn({f"levels.0.blocks.0.mixer.{k}": v for k, v in state.items()}, None)
    ours = {key.removeprefix("stages.0.blocks.0.mixer."): value for key, value in ours.items()}
    for kind, ending in (("soft", ""), ("hard", "_hard")):
        mixer = MambaVisionMixer(case["kwargs"]["d_model"], case["kwargs"]["d_state"], kind)
        mixer.load_state_dict(ours)
        assert sum(p.numel() for p in mixer.parameters()) == case["num_params"]
        seen = []
        mixer.sort.register_forward_hook(lambda module, args, y, seen=seen: seen.extend([args[0], y]))
        with torch.set_grad_enabled(grad):
            y = mixer(x).detach()
        assert error(y, outputs[f"y{ending}"]) <= 2e-5
        if seen:
            assert error(seen[0].detach(), outputs["scores"]) <= 2e-5
            assert error(seen[1].detach(), outputs[f"sort{ending}"]) <= 2e-4
        else:
            assert kind == "hard" and not grad


def test_hard_sorting_learns():
    """One-hot rows pass the soft ones' gradient on to the scores."""
    mixer = MambaVisionMixer(16, 4, "hard")
    mixer(torch.randn(2, 9, 16)).square().mean().backward()
    assert mixer.importance.weight.grad.abs().max() > 0


def test_orders_of_each_image():
    """`order` of scores is the permutation that a sharp SoftSort makes."""
    scores, x = torch.randn(3, 7), torch.randn(3, 7, 5)
    order = SoftSort.order(scores.unsqueeze(1))
    assert order.shape == (3, 1, 7) and order.dtype == torch.int32
    sharp = SoftSort(1e-4)(scores) @ x
    torch.testing.assert_close(sharp, x.gather(1, order.mT.expand_as(x).long()), rtol=1e-3, atol=1e-3)
    layer = S6(5, 1, 4)
    with torch.no_grad():
        walked = layer(x, order, merge=True).gather(1, order.mT.expand_as(x).long())
        torch.testing.assert_close(layer(sharp, merge=True), walked, rtol=1e-3, atol=1e-3)


def test_mixers_walk_each_image_by_its_own_order():
    """Convolution and scan of Mamba's mixer by the importance of each image's tokens."""
    mixer, x = MambaMixer(16, directions=2), torch.randn(3, 7, 16)
    order = SoftSort.order(torch.randn(3, 2, 7))
    with torch.no_grad():
        parts = [mixer(x[i : i + 1], order[i]) for i in range(3)]
        torch.testing.assert_close(mixer(x, order), torch.cat(parts))
        assert not torch.allclose(parts[1], mixer(x[1:2], order[0]))


@pytest.mark.parametrize("sign", SIGNS)
def test_signs(sign):
    case, state, outputs = case_of("op_xproj_sign")
    k = case["kwargs"]
    layer = S6(k["d_inner"], 1, k["d_state"], k["dt_rank"])
    layer.x_proj.data.copy_(state["original"].unsqueeze(0))
    definite_projection(layer, sign, k["threshold"])
    short = {"positive": "pos", "negative": "neg", "mixed": "real"}[sign]
    assert error(layer.x_proj[0].detach(), outputs[f"weight_{short}"]) <= 2e-5
    found = state_eigenvalues(layer)[0]
    assert found.imag.abs().max() <= 1e-6 * found.real.abs().max()
    assert error(found.real.sort().values, outputs[f"eigenvalues_{short}"]) <= 2e-5


@pytest.mark.filterwarnings("ignore:window_size")
@pytest.mark.parametrize("name", ["vmamba_t_v0", "vim_t", "mambavision_t", "vim2_t", "plainmamba_l1"])
def test_any_model(name):
    """Trains, copies and saves; without the parametrisation it computes the same."""
    small = dict(depth=2) if name in ("vim_t", "plainmamba_l1") else dict(depths=(1, 1, 1, 1))
    model = definite_projection(timm.create_model(name, num_classes=3, **small)).eval()
    for layer in scans_of(model).values():
        assert (state_eigenvalues(layer).real > 0).all()
    x = torch.randn(1, 3, 64, 64)
    model(x).square().mean().backward()
    raws = {n: p.grad for n, p in model.named_parameters() if n.endswith("x_proj.original")}
    assert len(raws) == len(scans_of(model)) and all(g.isfinite().all() and g.abs().max() > 0 for g in raws.values())
    again = definite_projection(timm.create_model(name, num_classes=3, **small)).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(again(x), y)
        torch.testing.assert_close(copy.deepcopy(model)(x), y)
        for layer in scans_of(model).values():
            parametrize.remove_parametrizations(layer, "x_proj")
        torch.testing.assert_close(model(x), y)
    timm.create_model(name, num_classes=3, **small).load_state_dict(model.state_dict())


def test_bad_input():
    with pytest.raises(ValueError, match="sign: expected one of positive, negative, mixed, got 'plus'"):
        definite_projection(S6(8, 1), "plus")
    with pytest.raises(ValueError, match=r"model: Linear has no selective scan \(S6\)"):
        definite_projection(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has 16 states and reads 8 channels; expected no more states than channels"):
        definite_projection(S6(8, 1, 16))
    with pytest.raises(ValueError, match="has a parametrised x_proj already"):
        definite_projection(definite_projection(S6(8, 1, 4)))
    with pytest.raises(ValueError, match="reorder: expected 'soft', 'hard' or None, got 'easy'"):
        timm.create_model("mambavision_t", reorder="easy", device="meta")
    with pytest.raises(ValueError, match="tau: expected a positive number, got 0"):
        SoftSort(0)


def test_flat_scores_give_the_window_mean():
    P = SoftSort()(torch.zeros(2, 5))
    np.testing.assert_allclose(P.numpy(), 0.2, rtol=1e-6)
