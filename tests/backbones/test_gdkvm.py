"""GDKVM: the authors' values, streaming, decays, masks that are given, bad input."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.gdkvm import QueryTransformer, aggregate, delta_memory
from linzoo.ops import gated_delta

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "tracking").glob("*.json"))}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("gdkvm_small_r18", decay="exp").eval()


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    case, file = CASES[name], tmp_path / "reference.pth"
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    torch.save({"it": 1, "weights": state, "optimizer": {}}, file)  # as the trainer saves them
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    [given] = case["inputs"]
    frames = (0.5 + 0.25 * torch.from_numpy(synth.image(given["shape"], given["seed"]))).clamp(0, 1)
    B, T = frames.shape[:2]
    with torch.inference_mode():
        results, last = model.run(frames)
        before = model.run(frames[:, :-1])[1]
        key = model.encode(frames.flatten(0, 1))[3].unflatten(0, (B, T))
    found = {f"logits_{t}": result["logits"] for t, result in enumerate(results)}
    found |= {f"mask_{T - 1}": last.mask, "state": before.memory, "key": key}
    found |= {name: results[-1][name] for name in ("sensory_logits", "q_logits")}
    for out in case["outputs"]:
        assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_variants():
    assert list_models(kind="tracking") == ["gdkvm", "gdkvm_small_r18"]
    small = timm.create_model("gdkvm_small_r18", device="meta")
    assert sum(p.numel() for p in small.parameters()) == 28_609_034
    logits, state = small.eval()(torch.empty(2, 3, 1, 64, 32, device="meta"))
    assert logits.shape == (2, 3, 2, 64, 32) and state.memory.shape == (2, 1, 64, 256)


def test_streaming(model):
    """A clip in parts, the state of one handed to the next, is the clip; the state does not grow."""
    frames, mask = torch.rand(1, 5, 1, 32, 48), (torch.rand(1, 2, 32, 48) > 0.5).float()
    with torch.inference_mode():
        whole, state = model(frames, mask)
        parts, last = [], None
        for part in frames.split([2, 1, 2], 1):
            logits, last = model(part, mask, last)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(last, state, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert state.memory.shape == (1, 2, 64, 256) and state.mask.shape == (1, 2, 32, 48)


def test_the_first_mask_is_seen(model):
    frames = torch.rand(1, 2, 1, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    with torch.inference_mode():
        unknown, empty = model(frames)[0], model(frames, mask)[0]
        mask[:, :, 8:24, 8:24] = 1
        known = model(frames, mask)[0]
    assert torch.equal(unknown, empty) and not torch.allclose(known, empty)


def test_memory_of_one_pixel_is_the_gated_delta_rule():
    """With one pixel, gates of one value each and no decay, the frame's rule is that of the operator."""
    keys = torch.nn.functional.normalize(torch.randn(2, 7, 8, dtype=torch.float64), dim=-1)
    values, beta = torch.randn(2, 7, 5, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    memory = torch.zeros(2, 1, 8, 5, dtype=torch.float64)
    for t in range(7):
        gate = beta[:, t].view(2, 1, 1, 1).expand_as(memory)
        memory = delta_memory(memory, keys[:, t : t + 1], values[:, None, t : t + 1], torch.ones_like(memory), gate)
    none = torch.zeros(2, 7, 1, dtype=torch.float64)
    _, state = gated_delta(keys[:, :, None], keys[:, :, None], values[:, :, None], none, beta[..., None])
    torch.testing.assert_close(memory, state)


def test_delta_memory_by_sums():
    """All pixels at once: each key's correction is taken from the memory in front of the frame."""
    memory, keys, values = torch.randn(1, 1, 3, 2), torch.randn(1, 4, 3), torch.randn(1, 1, 4, 2)
    decay, beta = torch.rand(1, 1, 3, 2), torch.rand(1, 1, 3, 2)
    held = sum(torch.outer(k, k) @ memory[0, 0] for k in keys[0])
    written = sum(torch.outer(k, v) for k, v in zip(keys[0], values[0, 0], strict=True))
    expected = decay * (memory - beta * held) + beta * written
    torch.testing.assert_close(delta_memory(memory, keys, values, decay, beta), expected)


def test_decays(model):
    memory = torch.randn(1, 1, 64, 256)
    gates = {}
    for decay in ("published", "grouped", "exp"):
        other = timm.create_model("gdkvm_small_r18", decay=decay)
        other.load_state_dict(model.state_dict())
        with torch.inference_mode():
            gates[decay], beta = other.gates(memory)
        assert beta.shape == memory.shape and (beta > 0).all() and (beta < 1).all()
    assert (gates["published"] <= 0).all() and (gates["exp"] > 0).all() and (gates["exp"] <= 1).all()
    torch.testing.assert_close(gates["exp"], gates["grouped"].exp())
    torch.testing.assert_close(gates["published"][..., :8], gates["grouped"][..., ::32])


def test_aggregate_is_softmaxs_inverse():
    p = torch.tensor([[0.7, 0.2]]).view(1, 2, 1, 1)
    logits = aggregate(p).flatten()
    odds = [0.3 * 0.8 / (1 - 0.3 * 0.8), 0.7 / 0.3, 0.2 / 0.8]
    torch.testing.assert_close(logits, torch.tensor(odds).log())
    assert aggregate(torch.ones(1, 1, 1, 1)).abs().max() < 16.2


def test_queries_that_would_see_nothing_see_all():
    transformer = QueryTransformer(256, device="meta")
    logits = torch.tensor([[-1.0, -1, -1, -1], [2, 2, 2, 2]]).view(1, 2, 2, 2)
    assert not transformer.hidden(logits).any()
    logits[0, :, 0, 0] = torch.tensor([3.0, 0.0])
    hidden = transformer.hidden(logits)
    assert hidden.shape == (8, 16, 4)
    assert hidden[:, :8, 0].all() and not hidden[:, :8, 1:].any()
    assert not hidden[:, 8:, 0].any() and hidden[:, 8:, 1:].all()


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = timm.create_model("gdkvm_small_r18", decay="exp").train()
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 10:50, 20:40] = 1
    results, state = model.run(torch.rand(1, 3, 1, 64, 64), mask)
    sum(value.square().mean() for result in results for value in result.values()).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert still == set()


def test_init_weights_after_to_empty():
    empty = timm.create_model("gdkvm_small_r18", device="meta", decay="exp").to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert empty.eval()(torch.rand(1, 1, 1, 32, 32))[0].isfinite().all()


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="decay: expected 'published', 'grouped' or 'exp', got 'none'"):
        timm.create_model("gdkvm", decay="none", device="meta")
    with pytest.raises(ValueError, match=r"frames: expected \(B, T, 1, H, W\), got \(1, 2, 3, 32, 32\)"):
        model(torch.rand(1, 2, 3, 32, 32))
    with pytest.raises(ValueError, match="frames: expected sides that are multiples of 16, got 32 x 40"):
        model(torch.rand(1, 2, 1, 32, 40))
    with pytest.raises(ValueError, match=r"mask: expected \(B, N, H, W\) = \(1, N, 32, 32\), got \(1, 1, 16, 16\)"):
        model(torch.rand(1, 2, 1, 32, 32), torch.rand(1, 1, 16, 16))


@pytest.mark.slow
def test_export(model):
    """One frame after another as a program: state in, state out."""

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, frames, *state):
            from linzoo.backbones.gdkvm import ClipState

            logits, state = self.model(frames, None, ClipState(*state))
            return (logits, *state)

    frames = torch.rand(1, 3, 1, 32, 48)
    with torch.inference_mode():
        _, state = model(frames[:, :1])
    state = tuple(x.clone() for x in state)
    program = torch.export.export(Step(), (frames[:, 1:2], *state), strict=False).module()
    with torch.no_grad():
        for t in (1, 2):
            logits, *state_ = program(frames[:, t : t + 1], *state)
            expected, state = model(frames[:, t : t + 1], None, type(model(frames[:, :1])[1])(*state))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(state_[0], state.memory, rtol=1e-4, atol=1e-4)
