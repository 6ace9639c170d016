"""OccRWKV: the authors' values, sparse operations against dense ones, voxels of any extent, bad input."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from test_parity import PARITY, error, synth

from linzoo.backbones import OccRWKV, list_models
from linzoo.backbones.occrwkv import (
    BEVBlock,
    BEVUNet,
    SubmanifoldConv3d,
    cell_max,
    cell_mean,
    checkpoint_filter_fn,
    coarsen,
    from_above,
    neighbours,
)

SMALL = dict(height=8, num_classes=5, dims=(8, 16, 16, 16, 16), voxel_dim=8)


def scene(batch=2, size=(32, 48, 8)):
    """Some of the ground's voxels, and a wall."""
    voxels = torch.zeros(batch, 1, *size)
    voxels[:, 0, :, :, 1] = (torch.rand(batch, *size[:2]) < 0.5).float()
    voxels[:, 0, 10, 5:20, 1:6] = 1
    return voxels


@pytest.fixture
def model():
    return OccRWKV(**SMALL).eval()


def test_parity():
    """An encoder stage of the U-Net: convolutions, RWKV block, fusion of the three branches."""
    case = json.loads((PARITY / "occupancy" / "occrwkv_bev_block.json").read_text())
    model = BEVUNet().eval()
    state = checkpoint_filter_fn({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, model)
    kept = model.load_state_dict(state, strict=False)
    assert not kept.unexpected_keys
    parts = model.stages[0].down, model.stages[0].block, model.stages[0].fusion
    assert sum(p.numel() for part in parts for p in part.parameters()) == case["num_params"]
    x, sem, com = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"])
    with torch.inference_mode():
        down = parts[0](x)
        rwkv = parts[1](down)
        ours = dict(down=down, rwkv=rwkv, fused=parts[2](rwkv, sem, com))
    assert len(case["outputs"]) == len(ours)
    for out in case["outputs"]:
        assert error(ours[out["name"]], out) <= case.get("tolerance", 2e-4), out["name"]


def test_parts_by_name(tmp_path):
    """The U-Net and a level of it are models of their own, which the authors' weights load into."""
    case = json.loads((PARITY / "occupancy" / "occrwkv_bev_block.json").read_text())
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, tmp_path / "block.pth")
    overlay = dict(file=str(tmp_path / "block.pth"))
    block = timm.create_model("occrwkv_bev_block", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x, sem, com = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"])
    with torch.inference_mode():
        fused = next(out for out in case["outputs"] if out["name"] == "fused")
        assert error(block(x, sem, com), fused) <= case.get("tolerance", 2e-4)

    dims = (8, 16, 16, 16, 16)
    unet = timm.create_model("occrwkv_bev_unet", height=8, dims=dims, num_classes=5).eval()
    assert isinstance(unet, BEVUNet)
    maps = [torch.randn(2, 8, 32 // s, 48 // s) for s in (2, 4, 8)]
    with torch.inference_mode():
        assert unet(torch.randn(2, 16, 32, 48), maps, maps).shape == (2, 5, 48, 32, 8)


def test_published_size_of_the_unet():
    """33.909 M with the four blocks of the decoder, which the authors' forward pass never calls."""
    with torch.device("meta"):
        unet, unused = BEVUNet(), [BEVBlock(dim) for dim in (512, 256, 128, 128)]
    assert sum(p.numel() for m in (unet, *unused) for p in m.parameters()) == 33_909_376


def test_unused_blocks_of_a_state_dict_are_left_out():
    model = BEVUNet(height=8, dims=(8, 16, 16, 16, 16))
    block = BEVBlock(16).state_dict()
    state = {f"rwkv_block_up1.{key}": value for key, value in block.items()}
    assert checkpoint_filter_fn(state, model) == {}


def test_submanifold_convolution_is_the_dense_one_where_voxels_are():
    occupied = torch.rand(2, 5, 6, 7) < 0.3
    coordinates = occupied.nonzero()
    conv, x = SubmanifoldConv3d(3, 4), torch.randn(len(coordinates), 3)
    dense = torch.zeros(2, 5, 6, 7, 3)
    dense[occupied] = x
    weight = conv.linear.weight.view(4, 3, 3, 3, 3).permute(0, 4, 1, 2, 3)  # (out, x, y, z, in)
    expected = F.conv3d(dense.permute(0, 4, 1, 2, 3), weight, padding=1).permute(0, 2, 3, 4, 1)[occupied]
    torch.testing.assert_close(conv(x, neighbours(coordinates, occupied.shape)), expected)


def test_cells():
    occupied = torch.rand(2, 6, 9, 4) < 0.3
    coordinates, x = occupied.nonzero(), torch.randn(int(occupied.sum()), 3)
    coarse, cell, size = coarsen(coordinates, tuple(occupied.shape), 4)
    assert size == (2, 2, 3, 1)
    parent = coordinates // torch.tensor([1, 4, 4, 4])
    assert torch.equal(coarse[cell], parent)
    for i, where in enumerate(coarse):
        inside = x[(parent == where).all(1)]
        torch.testing.assert_close(cell_mean(x, cell, len(coarse))[i], inside.mean(0))
        torch.testing.assert_close(cell_max(x, cell, len(coarse))[i], inside.amax(0))
    low = cell_mean(torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long), 1)
    assert low.item() == 1, "counts beyond what bfloat16 holds"


def test_map_from_above():
    occupied = torch.rand(2, 3, 5, 4) < 0.4
    coordinates, x = occupied.nonzero(), torch.randn(int(occupied.sum()), 2)
    dense = torch.full((2, 3, 5, 4, 2), -torch.inf)
    dense[occupied] = x
    highest = dense.amax(3)
    expected = highest.where(highest.isfinite(), 0).permute(0, 3, 2, 1)
    torch.testing.assert_close(from_above(x, coordinates, tuple(occupied.shape)), expected)


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
def test_any_extent(model, size):
    voxels = scene(size=(*size, 8))
    with torch.inference_mode():
        y = model(voxels)
        assert y.shape == (2, 5, *size, 8)
        assert y.isfinite().all()
        torch.testing.assert_close(model(voxels[1:]), y[1:], rtol=1e-4, atol=1e-4)


def test_what_the_branches_give(model):
    voxels = scene()
    logits, semantic, completion = model.branches(voxels)
    torch.testing.assert_close(logits, model(voxels))
    for i, ((of_cells, where), of_grid) in enumerate(zip(semantic, completion, strict=True)):
        stride = 2 ** (i + 1)
        occupied = F.max_pool3d(voxels, stride)[:, 0]
        assert torch.equal(where, occupied.nonzero())
        assert of_cells.shape == (len(where), 4)
        assert of_grid.shape == (2, 2, *occupied.shape[1:])


def test_every_parameter_learns(model):
    logits, semantic, completion = model.train().branches(scene())
    outputs = [logits, *(x for x, _ in semantic), *completion]
    sum(x.square().mean() for x in outputs).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    still = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert still == [], still


def test_precision(model):
    voxels = scene()
    with torch.inference_mode():
        exact = model(voxels)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(voxels)
        whole = OccRWKV(**SMALL, dtype=torch.bfloat16).eval()
        whole.load_state_dict(model.state_dict())
        half = whole(voxels)
    assert half.dtype == torch.bfloat16
    for y in (low, half):
        assert torch.cosine_similarity(y.float().flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("memory_format", (torch.channels_last, torch.channels_last_3d))
def test_memory_formats(model, memory_format):
    """Convolutions of maps and of volumes stand side by side: each takes its own format."""
    voxels = scene()
    with torch.inference_mode():
        y = model(voxels)
    model.to(torch.float32, memory_format=memory_format)
    axes = 4 if memory_format is torch.channels_last else 5
    assert all(p.is_contiguous(memory_format=memory_format) for p in model.parameters() if p.dim() == axes)
    with torch.inference_mode():
        torch.testing.assert_close(model(voxels), y, rtol=1e-4, atol=1e-4)


def test_init_weights_after_to_empty():
    model = OccRWKV(**SMALL, device="meta").to_empty(device="cpu")
    model.init_weights()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert model.eval()(scene()).isfinite().all()


def test_registered():
    assert list_models(kind="occupancy") == ["occrwkv", "occrwkv_bev_block", "occrwkv_bev_unet"]
    model = timm.create_model("occrwkv", **SMALL)
    assert isinstance(model, OccRWKV)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="in_chans: .* expected 1"):
        timm.create_model("occrwkv", in_chans=3)


def test_bad_input(model):
    empty = scene()
    empty[1] = 0
    for voxels, message in (
        (torch.ones(1, 1, 32, 32, 16), r"voxels: expected \(B, 1, X, Y, 8\), .* got \(1, 1, 32, 32, 16\)"),
        (torch.ones(1, 2, 32, 32, 8), "voxels: expected"),
        (torch.ones(32, 32, 8), "voxels: expected"),
        (torch.ones(1, 1, 40, 32, 8), "multiples of 16"),
        (empty, "expected occupied voxels .* got none in sample 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(voxels)
    with pytest.raises(ValueError, match="height: expected a multiple of 8, got 12"):
        OccRWKV(height=12)


@pytest.mark.slow
def test_published_extent():
    """SemanticKITTI's 256 x 256 x 32 voxels at 20 classes."""
    model = timm.create_model("occrwkv").eval()
    voxels = torch.zeros(1, 1, 256, 256, 32)
    voxels[0, 0, :, :, 2] = (torch.rand(256, 256) < 0.2).float()
    with torch.inference_mode():
        y = model(voxels)
    assert y.shape == (1, 20, 256, 256, 32)
    assert y.isfinite().all()
