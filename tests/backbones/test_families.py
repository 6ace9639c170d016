"""What MambaVision, PlainMamba and VideoMamba have of their own, beside the contract and parity."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch

import linzoo.backbones  # noqa: F401
from linzoo.backbones.plainmamba import directions, snakes
from linzoo.backbones.videomamba_video import checkpoint_filter_fn

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402
from test_parity import error  # noqa: E402

SMALL = dict(dim=16, depth=2, num_classes=3, img_size=32)


# --- MambaVision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [7, (14,), (14, 0), (14, 7.0)])
def test_windows_are_two_sizes(window_size):
    with pytest.raises(ValueError, match="window_size: expected two positive integers, .* got"):
        timm.create_model("mambavision_t", window_size=window_size, device="meta")


def test_a_window_larger_than_the_map_is_said():
    model = timm.create_model("mambavision_t", depths=(1, 1, 2, 2), dim=16, stem_dim=8, num_heads=(2, 2)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 3, 224, 224))
        with pytest.raises(UserWarning, match="window_size: a window of 14 x 14 is larger than the map of 4 x 6"):
            model(torch.zeros(1, 3, 64, 96))


def test_a_larger_window_is_one_window():
    """Where the window holds the whole map, a larger one changes what zeros attention sees, and nothing else."""
    few = dict(depths=(1, 1, 1, 1), dim=16, stem_dim=8, num_heads=(2, 2), num_classes=3)
    small = timm.create_model("mambavision_t", window_size=(6, 3), **few).eval()
    large = timm.create_model("mambavision_t", window_size=(6, 12), **few).eval()
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():  # one block a stage: a scan, which walks rows of another length
        assert not torch.allclose(large(x), small(x))
        same = large.forward_intermediates(x, intermediates_only=True)[2]
        torch.testing.assert_close(same, small.forward_intermediates(x, intermediates_only=True)[2])


# --- PlainMamba -----------------------------------------------------------------------------------------------------


def test_snakes_and_their_directions():
    order = snakes(2, 3, torch.device("cpu"))
    assert order.tolist() == [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    expected = [[0, 1, 1, 4, 2, 2], [0, 1, 1, 3, 2, 2], [0, 4, 1, 3, 1, 4], [0, 3, 2, 4, 2, 3]]
    assert directions(order, 3).tolist() == expected


def test_the_whole_token_follows_the_path_where_asked():
    """On a single row the first path is the raster order: there both rules agree for it, and differ for the others."""
    models = [timm.create_model("plainmamba_l1", consistent=c, dim=16, depth=1).eval() for c in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    u, mixers = torch.randn(1, 6, 16), [model.blocks[0].mixer for model in models]
    with torch.no_grad():
        assert not torch.allclose(mixers[0](u, (2, 3)), mixers[1](u, (2, 3)))
        torch.testing.assert_close(mixers[0](u[:, :1], (1, 1)), mixers[1](u[:, :1], (1, 1)))


# --- VideoMamba -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((PARITY / "video").glob("*.json")), ids=lambda p: p.stem)
def test_clips_equal_the_published_code(path, tmp_path):
    case = json.loads(path.read_text())
    file = tmp_path / "reference.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    clips = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, y: streams.append(y))
    with torch.inference_mode():
        logits = model(*clips)
    for out in case["outputs"]:
        if out["name"] == "logits":
            assert error(logits, out) <= 2e-4
        else:
            assert error(streams[int(out["name"].removeprefix("block"))], out) <= 1e-3, out["name"]


def test_weights_of_images_start_a_model_of_clips():
    """A clip whose tubelets have the picture in the middle, and all frames alike: copies of its tokens."""
    image = timm.create_model("videomamba_t", **SMALL).eval()
    clips = timm.create_model("videomamba_t_video", num_frames=6, tubelet_size=3, **SMALL).eval()
    clips.load_state_dict(checkpoint_filter_fn(image.state_dict(), clips))
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens, grid = clips.embed(x.unsqueeze(2).expand(-1, -1, 6, -1, -1))
        expected = image.embed(x)[0]
    assert grid == (2, 2, 3)
    torch.testing.assert_close(tokens, torch.cat([expected, expected[:, 1:]], 1))


def test_clips_of_other_lengths_and_sizes():
    model = timm.create_model("videomamba_s_video", num_frames=4, **SMALL).eval()
    torch.nn.init.normal_(model.time_embed)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 7, 48, 32)).shape == (2, 3)
        x = torch.randn(1, 3, 4, 32, 32)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert [y.shape for y in maps] == [(1, 16, 4, 2, 2)] * 2
        last, tokens = model.forward_intermediates(x, output_fmt="NLC")
        torch.testing.assert_close(maps[1].flatten(2).mT, tokens[1])
        torch.testing.assert_close(model.forward_head(last), model(x))


def test_clips_train():
    model = timm.create_model("videomamba_t_video", num_frames=2, drop_path_rate=0.1, **SMALL)
    model(torch.randn(2, 3, 2, 32, 32)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


def test_bad_clips():
    with pytest.raises(ValueError, match="num_frames: expected at least 4 frames, which are a tubelet, got 2"):
        timm.create_model("videomamba_t_video", num_frames=2, tubelet_size=4, device="meta")
    model = timm.create_model("videomamba_t_video", num_frames=4, tubelet_size=4, **SMALL)
    with pytest.raises(ValueError, match="x: expected at least 4 frames, which are a tubelet, got 3"):
        model(torch.zeros(1, 3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"x: expected clips \(B, 3, T, H, W\), got \(1, 3, 32, 32\)"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="input size: expected at least 16 x 16, got 8 x 32"):
        model(torch.zeros(1, 3, 4, 8, 32))
    with pytest.raises(ValueError, match="output_fmt: expected 'NCTHW', 'NTHWC' or 'NLC', got 'NCHW'"):
        model.forward_intermediates(torch.zeros(1, 3, 4, 32, 32), output_fmt="NCHW")


@pytest.mark.slow
def test_clips_export():
    model = timm.create_model("videomamba_t_video", num_frames=4, **SMALL).eval()
    auto = torch.export.Dim.AUTO
    dims = ({0: auto, 2: auto, 3: auto, 4: auto},)
    program = torch.export.export(model, (torch.randn(2, 3, 5, 48, 64),), dynamic_shapes=dims).module()
    x = torch.randn(1, 3, 6, 64, 32)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
