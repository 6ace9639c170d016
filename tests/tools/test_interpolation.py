"""Frames between frames: layouts, loss, metrics, folders and videos of any length, tiles, bad input."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import write_task, write_weights
from test_bad_input import refused

av = pytest.importorskip("av")

from linzoo.tools import predict, test, train  # noqa: E402
from linzoo.tools.engine import InputError, InterpolationMetric, Interpolator, Triplets  # noqa: E402
from linzoo.tools.engine.clips import stream_timed  # noqa: E402
from linzoo.tools.engine.interpolation import flow_between, laplacian_loss, write_video  # noqa: E402
from linzoo.tools.make_data import moving  # noqa: E402

SMALL = dict(dim=4, depth=1)


@pytest.fixture
def tiny(tmp_path):
    return write_task("interpolation", tmp_path)


@pytest.fixture
def video(tmp_path):
    """Five frames of 48 x 40 at uneven times, each brighter than the last."""
    frames = ((np.full((40, 48, 3), 20 + 40 * t, np.uint8), time) for t, time in enumerate((0, 0.04, 0.12, 0.16, 0.2)))
    assert write_video(frames, tmp_path / "uneven.mp4") == 5
    return tmp_path / "uneven.mp4"


def clip(folder: Path, count: int, size=(40, 48)) -> Path:
    folder.mkdir(parents=True)
    for t in range(count):
        Image.fromarray(np.full((*size, 3), 10 * t, np.uint8)).save(folder / f"{t:04d}.png")
    return folder


def test_gaps(tmp_path):
    """X-TRAIN's folders: neighbours of a triplet are as far apart as asked for, or as the clip allows."""
    clip(tmp_path / "train/002/occ008", 9)
    clip(tmp_path / "train/003/occ009", 2)
    for gap, values in ((1, (30, 40, 50)), (3, (10, 40, 70)), (8, (0, 40, 80))):
        item = Triplets(str(tmp_path), "train", "clips", gap)[0]
        assert [int(x.max()) for x in (item["inputs"][0], item["targets"], item["inputs"][1])] == list(values)
    dataset = Triplets(str(tmp_path), "train", "clips", (1, 3), crop=32)
    torch.manual_seed(0)
    steps = set()
    for _ in range(40):
        item = dataset[0]
        a, m, b = (int(x.max()) for x in (item["inputs"][0], item["targets"], item["inputs"][1]))
        assert m - a == b - m and item["inputs"].shape == (2, 3, 32, 32)
        steps.add(m - a)
    assert steps == {-30, -20, -10, 10, 20, 30}
    with pytest.raises(InputError, match="gap=0; expected a positive number"):
        Triplets(str(tmp_path), "train", "clips", 0)


def test_vimeo90k(tiny, tmp_path):
    root = tmp_path / "data/triplets"
    dataset = Triplets(str(root), "train")
    assert len(dataset) == 4
    item = dataset[1]
    name = (root / "tri_trainlist.txt").read_text().split()[1]
    for i, frame in ((1, item["inputs"][0]), (2, item["targets"]), (3, item["inputs"][1])):
        pixels = np.asarray(Image.open(root / "sequences" / name / f"im{i}.png"))
        assert np.array_equal(frame.permute(1, 2, 0), pixels)


def test_moving(tmp_path):
    """The middle frame is nearer to the classical flow's than to the mean; no frame is a copy."""
    moving(tmp_path / "moving")
    dataset = Triplets(str(tmp_path / "moving"), "test")
    assert len(dataset) == 40 and len(Triplets(str(tmp_path / "moving"), "train")) == 320
    metric = InterpolationMetric(against=True)
    for i in range(4):
        item = dataset[i]
        target = item["targets"].float() / 255
        metric.process({"inputs": [item["inputs"]]}, [(target, target)])
        assert not torch.equal(item["inputs"][0], item["inputs"][1])
    found = metric.compute_metrics(metric.results)
    assert found["flow_PSNR"] > found["average_PSNR"] + 3 and found["PSNR"] > 100


def test_flow_of_a_shift():
    """A smooth picture that moves by two pixels."""
    y, x = np.mgrid[:64, :64] / 8

    def picture(shift):
        wave = 0.5 + 0.25 * np.sin(x + shift / 8) + 0.2 * np.cos(1.3 * y)
        return torch.from_numpy(np.stack([wave] * 3)).float()

    middle = flow_between(picture(-1), picture(1))
    assert (middle - picture(0))[:, 8:-8, 8:-8].abs().max() < 0.01


def test_laplacian_loss():
    """Of a constant difference only the coarsest level remains; finer differences count once a level."""
    a = torch.rand(2, 3, 64, 48, dtype=torch.float64)
    torch.testing.assert_close(laplacian_loss(a, a + 0.3)[None], torch.tensor([0.3], dtype=torch.float64))
    assert laplacian_loss(a, a) == 0
    noise = torch.randn_like(a)
    assert laplacian_loss(a, a + noise) > noise.abs().mean()
    assert torch.autograd.gradcheck(lambda x: laplacian_loss(x, a[:1, :1, :9, :7]), a[1:, :1, :9, :7].requires_grad_())


def test_losses_and_channel_order():
    """With `bgr` the model sees channels turned round, and its frames are turned back."""
    torch.manual_seed(0)
    rgb = Interpolator("vfimamba_s", **SMALL).eval()
    bgr = Interpolator("vfimamba_s", bgr=True, **SMALL).eval()
    bgr.load_state_dict(rgb.state_dict())
    pairs = torch.randint(0, 255, (2, 2, 3, 32, 32), dtype=torch.uint8)
    targets = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(bgr(list(pairs)), rgb(list(pairs.flip(2))).flip(1))
        ours = bgr(list(pairs), list(targets), mode="loss")
        expected = rgb(list(pairs.flip(2)), list(targets.flip(1)), mode="loss")
    assert set(ours) == {"loss_frame", "loss_blends"}
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name])
    with pytest.raises(InputError, match="scale=2; expected a share of 1"):
        Interpolator("vfimamba_s", scale=2, **SMALL)


def test_train_test_predict(tiny, tmp_path, capsys):
    """The tools, one after the other; a folder becomes a folder, its own frames among the new ones."""
    train.main([tiny.config, "--work-dir", str(tmp_path / "run"), "--seed", "1"])
    weights = str(tmp_path / "run/export/model.safetensors")
    capsys.readouterr()
    test.main([tiny.config, str(tmp_path / "run/epoch_1.pth")])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"frame/PSNR", "frame/SSIM", "frame/average_PSNR", "frame/flow_PSNR"} <= metrics.keys()
    folder = clip(tmp_path / "in/a", 3)
    predict.main([tiny.config, weights, str(folder), "--out", str(tmp_path / "out"), "--factor", "4"])
    [result] = json.loads((tmp_path / "out/predictions.json").read_text())
    files = sorted(Path(result["folder"]).iterdir())
    assert result["count"] == len(files) == 9
    for t in range(3):
        assert (np.asarray(Image.open(files[4 * t])) == 10 * t).all()


def test_video_in_video_out(tiny, video, tmp_path):
    """Twice the frames; the new ones stand in the middle of uneven times."""
    weights = write_weights(tiny.config, tmp_path / "w.pth")
    predict.main([tiny.config, str(weights), str(video), "--gif", "--out", str(tmp_path / "out")])
    [result] = json.loads((tmp_path / "out/predictions.json").read_text())
    found = list(stream_timed(result["video"]))
    assert result["count"] == len(found) == 9
    times = [time for _, time in found]
    assert times == pytest.approx([0, 0.02, 0.04, 0.08, 0.12, 0.14, 0.16, 0.18, 0.2], abs=1e-3)
    for t in range(5):
        frame = found[2 * t][0]
        assert frame.shape == (40, 48, 3) and abs(frame.mean() - (20 + 40 * t)) < 4
    with Image.open(result["gif"]) as moving:
        assert moving.n_frames == 9 and moving.size == (48, 40) and moving.info["duration"] == 20
        moving.seek(8)
        assert abs(np.asarray(moving.convert("RGB")).mean() - 180) < 6


def test_halves_and_tiles(monkeypatch):
    """Seven frames between two, in their order; tiles of a local model are seamless."""
    task = Interpolator("vfimamba_s", **SMALL)
    monkeypatch.setattr(task, "between", lambda first, second: (first + second) / 2)
    found = task.halve(torch.zeros(3, 8, 8), torch.ones(3, 8, 8), 3, 200)
    assert [x.mean().item() for x in found] == pytest.approx([i / 8 for i in range(1, 8)])
    first, second = torch.rand(2, 3, 40, 500)
    torch.testing.assert_close(task.halve(first, second, 1, 200)[0], (first + second) / 2)


def test_bad_clips(tiny, video, tmp_path, capsys):
    """One line each; frames that were written stay whole."""
    weights, out = write_weights(tiny.config, tmp_path / "w.pth"), tmp_path / "out"

    def refuse(inputs, *options):
        return refused(capsys, predict.main, tiny.config, weights, inputs, "--out", out, *options)

    assert "--factor 3; expected one of 2, 4, 8" in refuse(video, "--factor", "3")
    assert "--frame-tile 64; expected more than 128" in refuse(video, "--frame-tile", "64")
    assert not out.exists()
    folder = clip(tmp_path / "odd", 3)
    Image.new("RGB", (50, 40)).save(folder / "0003.png")
    assert "frame 3 is 50 x 40; expected 48 x 40 as the first" in refuse(folder)
    files = sorted(out.rglob("*.png"))
    assert len(files) == 5 and all(np.asarray(Image.open(file)).shape == (40, 48, 3) for file in files)


def test_cut_video_leaves_a_whole_one(tiny, tmp_path, capsys):
    """A video cut off in the middle: its error in one line, and a video of what came before."""
    rng = np.random.default_rng(0)
    path = tmp_path / "cut.avi"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 48, 40, "yuv420p", Fraction(1, 25)
        for _ in range(40):
            pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: int(0.2 * path.stat().st_size)])
    weights = write_weights(tiny.config, tmp_path / "w.pth")
    line = refused(capsys, predict.main, tiny.config, weights, path, "--out", tmp_path / "out")
    assert "cut.avi'" in line
    [made] = (tmp_path / "out").rglob("*.mp4")
    assert len(list(stream_timed(made))) % 2 == 1
    assert not list((tmp_path / "out").rglob(".*"))


def test_bad_layouts(tiny, tmp_path, capsys):
    root = tmp_path / "data/triplets"
    with pytest.raises(InputError, match="layout='ucf'; expected one of vimeo90k, clips"):
        Triplets(str(root), "train", "ucf")
    name = (root / "tri_trainlist.txt").read_text().split()[0]
    Image.new("RGB", (10, 10)).save(root / "sequences" / name / "im3.png")
    assert "differ in size; expected equal ones" in refused(capsys, train.main, tiny.config)
    (root / "sequences" / name / "im3.png").unlink()
    assert "im3.png' not found; expected im1.png, im2.png and im3.png" in refused(capsys, train.main, tiny.config)
    (root / "tri_trainlist.txt").unlink()
    assert "tri_trainlist.txt' not found; expected Vimeo90K" in refused(capsys, train.main, tiny.config)
