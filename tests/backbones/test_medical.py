"""Swin-UMamba, U-Mamba and SegMamba: the authors' values, plans, sizes, deep supervision, starting weights."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.segmamba import SegMamba
from linzoo.backbones.umamba import MambaLayer, UMamba

CASES = sorted((PARITY / "medical").glob("*.json"))
PLAN2 = dict(patch_size=(32, 48), features=(8, 12, 16, 16), strides=(2, 2, (2, 4)))
PLAN3 = dict(patch_size=(4, 8, 8), features=(8, 12, 16), strides=((1, 2, 2), 2))
SMALL = {
    "segmamba": dict(dims=(4, 8, 8, 8), dim_bottom=16, depths=(1, 1, 1, 1), d_state=2),
    "swin_umamba": dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    "swin_umamba_d": dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), depth_decoder=1),
    "umamba_bot_2d": PLAN2,
    "umamba_enc_2d": PLAN2,
    "umamba_bot_3d": PLAN3,
    "umamba_enc_3d": PLAN3,
}
SIZES = {"segmamba": (32, 32, 64), "swin_umamba": (32, 64), "swin_umamba_d": (32, 64)}
DEEP = {"swin_umamba": (1, 2, 4, 8), "swin_umamba_d": (1, 4, 8, 16)}


def size_of(name):
    return SIZES.get(name, SMALL[name].get("patch_size"))


def small(name, **kwargs):
    return timm.create_model(name, **dict(SMALL[name], **kwargs))


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return small(name, in_chans=2, num_classes=3)


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
def test_parity(path, tmp_path):
    case = json.loads(path.read_text())
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    file, extra = tmp_path / "reference.pth", {}
    if "umamba_bot" in path.stem:  # nnU-Net's files hold tensors under two names
        extra = {f"decoder.{key}": value for key, value in state.items() if key.startswith("encoder.")}
        extra["encoder.stem.1.conv1.all_modules.0.weight"] = state["encoder.stem.1.conv1.conv.weight"]
    torch.save({"network_weights": state | extra} if extra else state, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    inputs = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    with torch.inference_mode():
        deep, maps = model.forward_deep(*inputs), model.forward_intermediates(*inputs, intermediates_only=True)
        found = {"logits": model(*inputs), **{f"deep{i}": y for i, y in enumerate(deep)}}
        found |= {f"{kind}{i}": y for i, y in enumerate(maps) for kind in ("stage", "skip")}
        if hasattr(model, "bottleneck"):
            found["bottleneck"] = model.bottleneck(maps[-1])
    for out in case["outputs"]:
        assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_registered():
    names = [n for kind in ("segmentation", "volume") for n in list_models(kind=kind) if "vm_unet" not in n]
    assert sorted(names) == sorted(SMALL)


def test_heads(model, name):
    """In training with deep supervision a list, the largest first; else one map."""
    x, deep = torch.randn(2, 2, *size_of(name)), model.forward_deep(torch.randn(1, 2, *size_of(name)))
    assert deep[0].shape == (1, 3, *size_of(name))
    expected = DEEP.get(name)
    if expected:
        assert [y.shape[2:] for y in deep] == [tuple(n // s for n in size_of(name)) for s in expected]
    assert isinstance(model.train()(x), torch.Tensor)
    if name != "segmamba":
        supervised = small(name, in_chans=2, num_classes=3, deep_supervision=True)
        assert [y.shape[1:] for y in supervised(x)] == [y.shape[1:] for y in deep]
        assert isinstance(supervised.eval()(x), torch.Tensor)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(x).shape == (2, 5, *size_of(name))
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features, *size_of(name))


def test_every_parameter_learns(model, name):
    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        sum(y.square().mean() for y in model.forward_deep(x)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    x = torch.randn(2, 2, *size_of(name))
    plain = gradients()
    # A bias ahead of a norm moves nothing, but for rounding.
    idle = [n for n, g in plain.items() if not n.endswith("bias") and not (g.isfinite().all() and g.any())]
    assert idle == [] and all(g.isfinite().all() for g in plain.values())
    model.set_grad_checkpointing(True)
    for key, g in gradients().items():
        torch.testing.assert_close(g, plain[key], rtol=1e-3, atol=1e-4, msg=key)


def test_sizes_that_are_no_multiples(model, name):
    """Padded with zeros behind, cropped; a size below the strides, or of other axes, is refused in a line."""
    if name == "umamba_enc_2d" or name == "umamba_enc_3d":
        sides = "its patch_size"
    else:
        sides = "below the model's strides"
        odd = (*size_of(name)[:-1], size_of(name)[-1] - 3)
        x, padded = torch.randn(1, 2, *odd), torch.zeros(1, 2, *size_of(name))
        padded[tuple(slice(0, n) for n in (1, 2, *odd))] = x
        with torch.inference_mode():
            y, expected = model.eval()(x), model(padded)
        assert y.shape == (1, 3, *odd)
        torch.testing.assert_close(y, expected[tuple(slice(0, n) for n in y.shape)])
    small_size = [3 * s if sides == "its patch_size" else s - 1 for s in model.strides]
    with pytest.raises(ValueError, match=f"x: .* {sides}"):
        model(torch.randn(1, 2, *small_size))
    axes = "D, H, W" if len(model.strides) == 3 else "H, W"
    with pytest.raises(ValueError, match=rf"x: expected \(B, 2, {axes}\), got \(1, 3, "):
        model(torch.randn(1, 3, *size_of(name)))


def test_init_weights_after_to_empty(name):
    empty = small(name, device="meta").to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert empty.eval()(torch.rand(1, empty.in_chans, *size_of(name))).isfinite().all()


def test_another_number_of_classes(model, name, tmp_path):
    """The rest loads, the heads begin anew, and that is said; what else differs is refused."""
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    settings = dict(pretrained=True, pretrained_cfg_overlay={"file": str(file)}, in_chans=2)
    with pytest.warns(UserWarning, match="heads of another number of classes begin anew: heads.0.weight"):
        other = small(name, num_classes=4, **settings)
    for key, value in other.state_dict().items():
        assert key.startswith("heads.") or torch.equal(value, model.state_dict()[key]), key
    same = small(name, num_classes=3, **settings)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())
    with pytest.raises(RuntimeError):
        small(name, num_classes=3, **dict(settings, in_chans=1))


def test_autocast(model, name):
    x = torch.randn(1, 2, *size_of(name))
    with torch.inference_mode():
        y = model.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x).float()
    assert torch.cosine_similarity(y.flatten(), low.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", ["swin_umamba", "swin_umamba_d"])
def test_init_from_classifier(name):
    """Stages by their names; D takes the patch embedding, too, the other the bias of its norm."""
    sizes = SMALL[name]
    classifier = timm.create_model("vmamba_t_v0", dims=sizes["dims"], depths=sizes["depths"])
    for p in classifier.parameters():
        torch.nn.init.normal_(p)
    model, start = small(name), classifier.state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_from_classifier(start)
    taken = set()
    for key, value in model.state_dict().items():
        theirs = key.replace(".norm.", ".norm1.") if ".blocks." in key else key.replace("embed.", "stem.")
        if theirs in start and torch.equal(value, start[theirs]):
            taken.add(key)
        else:
            assert torch.equal(value, before[key]), key
    embed = {key for key in before if key.startswith("embed.")} if name == "swin_umamba_d" else {"embed.norm.bias"}
    assert taken == {key for key in before if key.startswith("stages.")} | embed
    with pytest.raises(ValueError, match=r"expected 'stages.0.blocks.0.norm.weight' of shape \(8,\), got \(96,\)"):
        model.init_from_classifier(timm.create_model("vmamba_t_v0", depths=(1, 1, 1, 1)).state_dict())


def test_plans():
    """What nnU-Net plans: strides and kernels of each axis; where Mamba layers stand; channels as tokens."""
    plan = dict(patch_size=(8, 32, 32), features=(8, 8, 8), strides=((1, 2, 2), (1, 2, 2)))
    model = UMamba(kernel_sizes=((1, 3, 3), 3, 3), mamba="enc", **plan)
    assert model.strides == (1, 4, 4) and model.stages[0].blocks[0].conv1.kernel_size == (1, 3, 3)
    assert model(torch.randn(1, 1, 8, 32, 32)).shape == (1, 2, 8, 32, 32)
    flat = dict(features=(8, 8, 8, 8), strides=(2, 2, 2), mamba="enc")
    for patch, kinds in (((32, 32), [0, 1, 0, 1]), ((16, 16), [0, 1, 0, 2])):
        stages = UMamba(patch_size=patch, **flat).stages
        found = [1 + (s.mamba.positions is not None) if isinstance(s.mamba, MambaLayer) else 0 for s in stages]
        assert found == kinds
    for wrong, said in (
        (dict(patch_size=(8, 30, 32)), r"patch_size=\(8, 30, 32\): expected multiples of .* \(1, 4, 4\)"),
        (dict(strides=(2,)), "expected 2 strides and 3 kernels of 3 axes"),
        (dict(mamba="both"), "mamba='both': expected 2 or 3 axes, and 'bot' or 'enc'"),
    ):
        with pytest.raises(ValueError, match=said):
            UMamba(**dict(plan, **wrong))


def test_segmamba_slices():
    with pytest.raises(ValueError, match=r"map of \(2, 6, 6\) has 72 voxels; expected a multiple of its 16 slices"):
        SegMamba(**SMALL["segmamba"])(torch.randn(1, 1, 16, 48, 48))


@pytest.mark.slow
def test_export(name):
    """One exported program at two sizes, where the plan takes more than one."""
    model, x = small(name).eval(), torch.rand(1, small(name).in_chans, *size_of(name))
    if "enc" in name:
        sizes, shapes = [size_of(name)], None
    else:
        step = 32 if "segmamba" in name or "swin" in name else model.strides[-1]
        sides = {len(x.shape) - 1: step * torch.export.Dim("w", min=1, max=9)}
        shapes = {"x": sides}  # of the last axis any multiple
        sizes = [size_of(name), (*size_of(name)[:-1], size_of(name)[-1] + step)]
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for size in sizes:
        x = torch.rand(1, model.in_chans, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)
