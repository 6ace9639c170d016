"""Restore-RWKV and FS-RWKV: the authors' values by both paths of Omni-Shift, its kernels, images of any size."""

import json

import pytest
import pywt
import timm
import torch
import torch.nn.functional as F
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.fs_rwkv import FSOShift, bands, from_bands
from linzoo.backbones.layers import OmniShift, fuse_for_inference

SMALL = dict(dim=8, depths=(1, 1, 1, 1), refinement=1)
CASES = sorted((PARITY / "restore").glob("*.json"))


@pytest.fixture(params=list_models("*rwkv*", kind="restoration"))
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, **SMALL).eval()


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
        ours = {f"stage{i}": y for i, y in enumerate(model.forward_intermediates(*inputs, intermediates_only=True))}
        ours |= {"restored": model(*inputs), "restored_train_path": model.train()(*inputs)}
    assert len(case["outputs"]) == len(ours)
    for out in case["outputs"]:
        assert error(ours[out["name"]], out) <= case.get("tolerance", 2e-4), out["name"]


def branches(shift, x):
    """The sum of the four branches, one by one."""
    y, C = x.permute(0, 3, 1, 2), x.shape[-1]
    total = shift.alpha[0] * y
    for alpha, size in zip(shift.alpha[1:], (1, 3, 5), strict=True):
        total = total + alpha * F.conv2d(y, shift.get_parameter(f"kernel{size}"), padding=size // 2, groups=C)
    return total.permute(0, 2, 3, 1)


def test_omni_shift_is_the_sum_of_its_branches():
    """In training, in evaluation after any change of its weights, and fused."""
    torch.manual_seed(0)
    shift, x = OmniShift(7), torch.randn(2, 5, 9, 7)
    optimizer = torch.optim.SGD([p for p in shift.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = (shift.train()(x) - x).square().mean()
        torch.testing.assert_close(shift(x), branches(shift, x))
        gradients = torch.autograd.grad(branches(shift, x).square().sum(), [shift.alpha, shift.kernel3])
        ours = torch.autograd.grad(shift(x).square().sum(), [shift.alpha, shift.kernel3])
        torch.testing.assert_close(ours, gradients, rtol=1e-5, atol=1e-4)
        loss.backward()
        optimizer.step()
        expected = branches(shift, x)
        torch.testing.assert_close(shift.eval()(x), expected)
        torch.testing.assert_close(shift.fuse()(x), expected)
    state = {name: torch.randn_like(t) for name, t in shift.state_dict().items()}
    shift.load_state_dict(state)
    torch.testing.assert_close(shift(x), branches(shift, x))


def test_fuse_for_inference(model):
    x = torch.rand(1, 1, 24, 16)
    fused = fuse_for_inference(model)
    assert not [m for m in fused.modules() if isinstance(m, OmniShift)]
    with torch.inference_mode():
        y = model(x)
        assert (fused(x) - y).abs().max() <= 1e-5 * y.std()


@pytest.mark.parametrize("size", [(8, 8), (13, 30), (1, 5)])
def test_any_size(model, size):
    x = torch.rand(2, 1, *size)
    with torch.inference_mode():
        y = model(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        torch.testing.assert_close(model(x[:1]), y[:1])


def test_every_parameter_learns(model):
    model.train()(torch.rand(2, 1, 16, 24)).square().sum().backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.endswith(".merged") for name in frozen)
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert plain.keys() == {n for n, p in model.named_parameters() if p.grad is not None}


def test_channels_and_precision(model):
    colour = timm.create_model(model.pretrained_cfg["architecture"], in_chans=3, **SMALL).eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        assert colour(x).shape == x.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert (colour(x) - colour(x.float())).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"x: expected \(B, 1, H, W\), got \(1, 3, 16, 16\)"):
        model(x)


def test_init_weights_after_to_empty(model):
    name = model.pretrained_cfg["architecture"]
    empty = timm.create_model(name, device="meta", **SMALL).to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert empty.eval()(torch.rand(1, 1, 16, 16)).isfinite().all()


def test_haar_equals_pywavelets_and_inverts():
    x = torch.randn(2, 6, 10, 3, dtype=torch.float64)
    parts = bands(x)
    ll, (along_columns, along_rows, both) = pywt.dwt2(x.numpy(), "haar", axes=(1, 2))
    for ours, theirs in zip(parts, (ll, along_rows, along_columns, both), strict=True):
        torch.testing.assert_close(ours.abs(), torch.from_numpy(theirs).abs())
    torch.testing.assert_close(from_bands(*parts), x)
    energy = sum(band.square().sum() for band in parts)
    torch.testing.assert_close(energy, x.square().sum())


def test_fso_shift_leaves_the_high_bands_alone():
    torch.manual_seed(0)
    shift, x = FSOShift(5), torch.randn(2, 8, 12, 5)
    before, after = bands(x), bands(shift(x))
    for band, shifted in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(shifted, band)
    torch.testing.assert_close(after[0], shift.low(before[0]))


@pytest.mark.slow
def test_compile_and_export(model):
    x = torch.rand(1, 1, 16, 24)
    with torch.inference_mode():
        y = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), y, rtol=1e-4, atol=1e-5)
