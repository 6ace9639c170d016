"""State tuning of Vision-RWKV-6: zeros change nothing, states alone learn, a small file holds them."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import linzoo.backbones  # noqa: F401
from linzoo.backbones.layers.state_tuning import tuned_states
from linzoo.ops import use_backend

SMALL = dict(dim=64, depth=2, img_size=32, patch_size=8, num_classes=3)


def create(**kwargs):
    return timm.create_model("vrwkv6_t", **{**SMALL, **kwargs}).eval()


def test_zero_states_change_nothing():
    model, x = create(), torch.randn(2, 3, 32, 40)
    before = model(x)
    model.state_tuning(head=False)
    torch.testing.assert_close(model(x), before)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"blocks.0.mixer.time_state", "blocks.1.mixer.time_state"}
    assert tuned_states(model).keys() == learns
    model(x).square().mean().backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in learns)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_states_learn_and_load(tmp_path, ending):
    """Frozen weights and tuned states overfit one batch; the file turns the model that it was tuned from into this."""
    base = create()
    torch.save(base.state_dict(), tmp_path / "base.pth")
    overlay = dict(file=str(tmp_path / "base.pth"), num_classes=3)
    model = create(state_tuning=True, pretrained=True, pretrained_cfg_overlay=overlay)
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    torch.testing.assert_close(model(x), base(x))
    states = [p for name, p in model.named_parameters() if name.endswith("time_state")]
    head = list(model.get_classifier().parameters())
    learns = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learns} == {id(p) for p in states + head}
    optimizer = torch.optim.Adam([{"params": states, "lr": 0.3}, {"params": head, "lr": 1e-2}])
    for _ in range(60):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    frozen = {key: value for key, value in model.state_dict().items() if key not in tuned_states(model)}
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in frozen.items())
    file = tmp_path / f"states.{ending}"
    if ending == "pth":
        torch.save(tuned_states(model), file)
    else:
        model.save_states(file)
        assert load_file(file).keys() == {*tuned_states(model)} and file.stat().st_size < 150_000
    base.load_states(file)
    with torch.no_grad():
        torch.testing.assert_close(base(x), model(x))
    again = create(state_tuning=True)
    again.load_state_dict(model.state_dict())


def test_states_of_one_direction():
    """RWKV-PEFT's names and (H, P, N): the state before the first token."""
    state, model, x = torch.randn(1, 64, 64), create(), torch.randn(1, 3, 32, 32)
    model.load_states({f"blocks.{i}.att.time_state": state for i in range(2)})
    for block in model.blocks:
        assert torch.equal(block.mixer.time_state[0], state) and not block.mixer.time_state[1].any()
    assert not torch.allclose(model(x), create()(x))


def test_shared_state_gets_the_sum_of_gradients():
    model, x = create(state_tuning=True), torch.randn(3, 3, 32, 32)
    [state, *_] = tuned_states(model)
    parameter = model.get_parameter(state)
    whole = torch.autograd.grad(model(x).sum(), parameter)[0]
    parts = sum(torch.autograd.grad(model(x[i : i + 1]).sum(), parameter)[0] for i in range(3))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="model: VRWKV has no matrix states to tune; expected mixers of RWKV-6 or 7"):
        timm.create_model("vrwkv_t", state_tuning=True, **SMALL)
    model, good = create(), {f"blocks.{i}.mixer.time_state": torch.zeros(2, 1, 64, 64) for i in range(2)}
    with pytest.raises(ValueError, match=r"states: blocks.1.mixer.time_state: expected \(2, 1, 64, 64\), got absent"):
        model.load_states({"blocks.0.mixer.time_state": good["blocks.0.mixer.time_state"]})
    with pytest.raises(ValueError, match=r"expected \(2, 1, 64, 64\), got \(2, 2, 64, 64\)"):
        model.load_states(good | {"blocks.0.mixer.time_state": torch.zeros(2, 2, 64, 64)})
    with pytest.raises(ValueError, match=r"states: head.weight: expected \(3, 64\), got \(5, 64\)"):
        model.load_states(good | {"head.weight": torch.zeros(5, 64)})
    with pytest.raises(ValueError, match="states: neck: expected absent"):
        model.load_states(good | {"neck": torch.zeros(5)})
    with pytest.raises(FileNotFoundError):
        model.load_states(tmp_path / "nothing.safetensors")
    assert model.blocks[0].mixer.time_state is None
    with pytest.raises(ValueError, match="model: VRWKV6 has no tuned states; expected one after state_tuning"):
        model.save_states(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_exports_with_states(tmp_path):
    """To an archive of torch and to ONNX, at another size than traced."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = create(state_tuning=True)
    for block in model.blocks:
        torch.nn.init.normal_(block.mixer.time_state)
    x, other = torch.randn(1, 3, 40, 48), torch.randn(1, 3, 64, 56)
    sides = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (x,), dynamic_shapes=sides).module()
    with torch.no_grad():
        torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-4)
        with use_backend("export"):
            torch.onnx.export(model, (x,), dynamic_shapes=sides, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        y = session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(y), model(other), rtol=1e-3, atol=1e-3)
