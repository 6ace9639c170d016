"""VFIMamba: the authors' values, orders, warps, sizes, scales."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.vfimamba import InterleavedSS2D, resize_flow, warp
from linzoo.ops import scan_order

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "interpolation").glob("*.json"))}
SMALL = dict(dim=8, depth=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vfimamba_s", **SMALL).eval()


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    case, file = CASES[name], tmp_path / "reference.pkl"
    state = {f"module.{k}": torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    torch.save(state, file)  # as the authors save them
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    [given], options = case["inputs"], case.get("forward", {})
    pair = (0.5 + 0.25 * torch.from_numpy(synth.image(given["shape"], given["seed"]))).clamp(0, 1)
    with torch.inference_mode():
        found = model.run(pair[:, :3], pair[:, 3:], options.get("timestep", 0.5), options.get("local", True))
    values = {f"stage{i}": x for i, x in enumerate(found["features"])}
    values |= dict(pred=found["frame"], merged=found["merged"], refine=found["residual"])
    values |= dict(flow=found["motion"].flow, mask_logit=found["motion"].mask, flow_first=found["motions"][0].flow)
    for out in case["outputs"]:
        assert error(values[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_variants():
    assert list_models(kind="interpolation") == ["vfimamba", "vfimamba_s"]
    for name, count in (("vfimamba", 66_070_921), ("vfimamba_s", 16_792_786)):
        assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


def test_interleaved_orders():
    """Every route visits both maps' tokens of a pixel one after the other; places follow the authors' formula."""
    H, W = 3, 4
    order, places = scan_order.interleaved(H, W), scan_order.interleaved_places(H, W)
    for routes in (order, places):
        assert routes.shape == (4, 2 * H * W)
        assert all(sorted(route.tolist()) == list(range(2 * H * W)) for route in routes)
    for route, walk in zip(order, scan_order.cross(H, W), strict=True):
        assert torch.equal(route[0::2] % (H * W), walk) and torch.equal(route[1::2] % (H * W), walk)
    assert order[0, :2].tolist() == [0, H * W] and order[2, :2].tolist() == [2 * H * W - 1, H * W - 1]
    assert torch.equal(places[0], order[0]) and torch.equal(places[3], places[1].flip(0))
    for t in range(2 * H * W):
        s, x, y = t // (H * W), t % (H * W) // H, t % H
        slot = s * H * W + y * W + x  # of the interleaved rows: twice the pixel, and the map
        assert places[1, t] == slot % 2 * H * W + slot // 2


def test_scans_read_in_one_order_and_write_in_another():
    """Step by step, against the layer."""
    torch.manual_seed(0)
    layer, H, W = InterleavedSS2D(4, 2.0, 3, gated=True).double(), 2, 3
    maps = torch.randn(2, H, W, 8, dtype=torch.float64)
    read, write = scan_order.interleaved(H, W).long(), scan_order.interleaved_places(H, W).long()
    tokens = maps.reshape(1, 2 * H * W, 8)
    expected, proper = torch.zeros(2 * H * W, 8, dtype=torch.float64), torch.zeros(2 * H * W, 8, dtype=torch.float64)
    with torch.no_grad():
        by_token = layer.s6(tokens, read.int())[0]  # (L, 4, D)
        for k in range(4):
            for t in range(2 * H * W):
                expected[write[k, t]] += by_token[read[k, t], k]
                proper[read[k, t]] += by_token[read[k, t], k]
        torch.testing.assert_close(layer.scan(maps).flatten(0, 2), expected)
        layer.transposed_halves = False
        torch.testing.assert_close(layer.scan(maps).flatten(0, 2), proper)


def test_warp_follows_the_flow():
    image = torch.rand(1, 3, 6, 8)
    flow = torch.zeros(1, 2, 6, 8)
    torch.testing.assert_close(warp(image, flow), image)
    flow[:, 0], flow[:, 1] = 2, -1
    moved = warp(image, flow)
    torch.testing.assert_close(moved[..., 1:, :6], image[..., :-1, 2:])
    torch.testing.assert_close(moved[..., 0, 7], image[..., 0, 7])  # outside, the edge goes on
    half = resize_flow(flow, 3, 4)
    assert half.shape == (1, 2, 3, 4) and (half[:, 0] == 1).all() and (half[:, 1] == -0.5).all()


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_any_size(model, size):
    first, second = torch.rand(2, 2, 3, *size)
    with torch.inference_mode():
        y = model(first, second)
        assert y.shape == first.shape and y.min() >= 0 and y.max() <= 1
        for options in (dict(scale=0.5), dict(scale=0.5, high_resolution=True), dict(local=False), dict(flip=True)):
            assert model(first, second, **options).shape == first.shape
        each = torch.cat([model(first[i : i + 1], second[i : i + 1], t) for i, t in enumerate((0.25, 0.75))])
        torch.testing.assert_close(model(first, second, torch.tensor([0.25, 0.75])), each, rtol=1e-3, atol=1e-4)
        fitting = torch.rand(2, 1, 3, 48, 80)
        torch.testing.assert_close(model(*fitting), model.run(*fitting)["frame"])
        turned = model(first.flip(2, 3), second.flip(2, 3)).flip(2, 3)
        torch.testing.assert_close(model(first, second, flip=True), (model(first, second) + turned) / 2)


def test_scales(model):
    """Flow from half the size is in the pixels of the whole; high resolution refines there, too."""
    first, second = torch.rand(2, 1, 3, 64, 96)
    with torch.inference_mode():
        low = model.run(first[..., ::2, ::2], second[..., ::2, ::2], local=False)
        assert model.run(first, second, scale=0.5, local=False)["motion"].flow.shape == (1, 4, 64, 96)
        plain = model.run(first, second, scale=0.5)
        high = model.run(first, second, scale=0.5, high_resolution=True)
    assert low["motion"].flow.shape == (1, 4, 32, 48) and len(plain["motions"]) == len(high["motions"]) == 2
    assert not torch.allclose(plain["motion"].flow, high["motion"].flow)
    assert [tuple(x.shape[2:]) for x in high["features"]] == [(64 // 2**i, 96 // 2**i) for i in range(5)]


def test_every_parameter_learns(model):
    first, second = torch.rand(2, 1, 3, 32, 48)
    found = model.train().run(first, second)
    (found["frame"].square().mean() + found["merged"].square().mean()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()} == set()


def test_init_weights_after_to_empty():
    empty = timm.create_model("vfimamba_s", device="meta", **SMALL).to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    assert empty.eval()(*torch.rand(2, 1, 3, 32, 32)).isfinite().all()


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"expected two of one shape \(B, 3, H, W\), got \(1, 3, 32, 32\)"):
        model(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"first: expected sides of 32 at least that are multiples of 16"):
        model.run(*torch.rand(2, 1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"time: expected 0 to 1, got 1.5"):
        model(*torch.rand(2, 1, 3, 32, 32), 1.5)


@pytest.mark.slow
def test_export(model):
    first, second = torch.rand(2, 1, 3, 64, 96)
    program = torch.export.export(model, (first, second)).module()
    with torch.inference_mode():
        torch.testing.assert_close(program(first, second), model(first, second), rtol=1e-3, atol=1e-4)
