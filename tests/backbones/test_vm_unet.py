"""VM-UNet and MHS-VM: dense models, outside the backbones' contract."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.vm_unet import VMUNet, head_routes, scan_route_attention

SMALL = dict(dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), depths_decoder=(1, 1, 1, 1))
CASES = sorted((PARITY / "dense").glob("*.json"))


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
def test_parity(path, tmp_path):
    case = json.loads(path.read_text())
    file = tmp_path / "reference.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    inputs = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    with torch.inference_mode():
        logits, maps = model(*inputs), model.forward_intermediates(*inputs, intermediates_only=True)
    ours = {"logits": logits, "prob": logits.sigmoid(), **{f"stage{i}": y for i, y in enumerate(maps)}}
    checked = [out["name"] for out in case["outputs"] if out["name"] in ours]
    assert {"logits", "prob", "stage0", "stage3"} <= set(checked)
    for out in case["outputs"]:
        if out["name"] in ours:
            assert error(ours[out["name"]], out) <= case["tolerance"], out["name"]


def test_registered():
    assert list_models("*vm_unet", kind="segmentation") == ["mhs_vm_unet", "vm_unet"]
    assert not set(list_models()) & set(list_models(kind="segmentation"))


@pytest.mark.parametrize("num_heads", (None, 3, 4))
def test_any_size_trains(num_heads):
    model = VMUNet(num_heads=num_heads, num_classes=3, gfu_t=0.0, **SMALL)
    for channels, size in ((3, (32, 64)), (1, (50, 37))):
        logits = model(torch.randn(2, channels, *size))
        assert logits.shape == (2, 3, *size)
    model.set_grad_checkpointing()
    model(torch.randn(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.reset_classifier(2)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2, 32, 32)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, model.num_features, 32, 32)


def test_routes_of_each_head_are_four_permutations():
    for name, routes in head_routes(3, 4).items():
        assert routes.shape == (4, 12), name
        assert (routes.sort(-1).values == torch.arange(12)).all(), name
        assert torch.equal(routes[1], routes[0].flip(0)) and torch.equal(routes[3], routes[2].flip(0)), name
    assert head_routes(3, 4)["X"][2].tolist()[:4] == [3, 2, 7, 11]  # from the upper right corner
    assert head_routes(3, 4)["S"][2].tolist()[:4] == [8, 9, 10, 11]  # from the lower left corner


def test_scan_route_attention_by_hand():
    y = torch.tensor([1.0, 2.0, 4.0, 5.0]).view(1, 1, 4, 1)
    variation = torch.tensor([1.0, 2.0, 4.0, 5.0]).std() / (2 + 1e-5)
    torch.testing.assert_close(scan_route_attention(y, 0.5), (12 * (variation - 0.5)).view(1, 1, 1))
    assert scan_route_attention(y, 2.0).item() == 0


def test_published_files_may_hold_the_other_name_of_a_tensor():
    case = json.loads((PARITY / "dense/mhs_vm_unet.json").read_text())
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    renamed = {
        k.replace(".mambaeng.", ".scanning.seq2seq_engine.").replace("x_ssproj_W", "x_ssproj.weight"): v
        for k, v in state.items()
    }
    assert renamed.keys() != state.keys()
    model = timm.create_model("mhs_vm_unet", device="meta")
    convert = timm.models.model_entrypoint("mhs_vm_unet").__globals__["checkpoint_filter_fn"]
    assert convert(renamed, model).keys() == convert(state, model).keys() == model.state_dict().keys()


def test_init_from_classifier():
    """Encoder by names, the blocks of decoder level 3 - i from encoder level i; nothing else changes."""
    dims = SMALL["dims"]
    classifier = timm.create_model("vmamba_s_v0", dims=dims, depths=(2, 2, 3, 2)).state_dict()
    model = VMUNet(dims=dims)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_from_classifier(classifier)
    for key, value in model.state_dict().items():
        if key.startswith("decoder.") and ".blocks." in key:
            level, rest = key.removeprefix("decoder.").split(".", 1)
            source = f"stages.{3 - int(level)}.{rest}"
        else:
            source = key
        expected = classifier[source.replace(".norm.", ".norm1.") if ".blocks." in key else source] if (
            key.startswith(("stem.", "stages.")) or ".blocks." in key
        ) else before[key]  # fmt: skip
        assert torch.equal(value, expected), key
    with pytest.raises(ValueError, match=r"expected 'stem.proj.weight' of shape \(16, .* got \(32,"):
        model.init_from_classifier(timm.create_model("vmamba_s_v0", dims=(32, 64, 128, 256)).state_dict())
    with pytest.raises(ValueError, match="got none"):
        model.init_from_classifier({})


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_heads: expected 3, 4, or None .* got 5"):
        VMUNet(num_heads=5, **SMALL)
    with pytest.raises(ValueError, match="x: expected 3 channels .* got 2"):
        VMUNet(**SMALL)(torch.randn(1, 2, 32, 32))
    with pytest.raises(TypeError):
        timm.create_model("vm_unet", no_such_argument=1)
