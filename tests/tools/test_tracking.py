"""Segmentation of clips: layouts, crops, losses, metrics, streams of any length, bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import write_task, write_weights
from test_bad_input import refused

pytest.importorskip("monai")
av = pytest.importorskip("av")
nibabel = pytest.importorskip("nibabel")

from linzoo.tools import predict, test, train  # noqa: E402
from linzoo.tools.engine import ClipMetric, ClipSegmenter, InputError, MaskedClips  # noqa: E402
from linzoo.tools.engine.clips import stream_frames  # noqa: E402
from linzoo.tools.engine.config import load_config  # noqa: E402
from linzoo.tools.engine.task import build  # noqa: E402
from linzoo.tools.make_data import beating  # noqa: E402

TINY = dict(encoder="test_resnet", mask_encoder="test_resnet", decoder_dims=(32, 16, 16), decay="exp")


def write_video(path: Path, frames: np.ndarray) -> None:
    """Frames uint8 (T, H, W, 3) as a video file."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture
def video(tmp_path):
    """A video of nine frames, 48 x 40, each brighter than the last."""
    frames = np.stack([np.full((40, 48, 3), 20 + 20 * t, np.uint8) for t in range(9)])
    write_video(tmp_path / "heart.mp4", frames)
    return tmp_path / "heart.mp4"


@pytest.fixture
def tiny(tmp_path):
    return write_task("tracking", tmp_path)


def test_folders(tiny, tmp_path):
    """Frames from the first to the last; a frame without mask is 255 throughout."""
    root = tmp_path / "data/masked"
    (root / "train/masks/a/1.png").unlink()
    item = MaskedClips(str(root), "train", num_frames=3, size=None)[0]
    assert item["inputs"].shape == (3, 1, 40, 48) and item["masks"].shape == (3, 40, 48)
    for t in (0, 2):
        assert np.array_equal(item["inputs"][t, 0], np.asarray(Image.open(root / f"train/frames/a/{t}.png")))
        assert np.array_equal(item["masks"][t] * 255, np.asarray(Image.open(root / f"train/masks/a/{t}.png")))
    assert (item["masks"][1] == 255).all()
    small = MaskedClips(str(root), "train", num_frames=2, size=20)[0]
    assert small["inputs"].shape == (2, 1, 20, 20) and small["spacing"].tolist() == pytest.approx([2.0, 2.4])


def test_augmentation_moves_frames_and_masks_alike(tmp_path):
    """Where frame and mask are the same picture they stay the same, up to interpolation."""
    y, x = np.mgrid[:64, :64]
    disc = (((y - 20) ** 2 + (x - 40) ** 2 < 200) * 255).astype(np.uint8)
    for kind in ("frames", "masks"):
        (tmp_path / "train" / kind / "a").mkdir(parents=True)
        for t in range(2):
            Image.fromarray(disc).save(tmp_path / "train" / kind / "a" / f"{t}.png")
    dataset = MaskedClips(str(tmp_path), "train", num_frames=2, size=64, augment=True)
    torch.manual_seed(0)
    sides = set()
    for _ in range(16):
        item = dataset[0]
        assert ((item["inputs"][:, 0] > 127) == (item["masks"] == 1)).float().mean() > 0.99
        assert torch.equal(item["inputs"][0], item["inputs"][1])
        sides.add(bool(item["masks"][0, :, :32].sum() > item["masks"][0, :, 32:].sum()))
    assert sides == {True, False}


def test_camus(tmp_path):
    """Half sequences as NIfTI, parts by the list of patients, class 1 alone, millimetres."""
    (tmp_path / "database_split").mkdir()
    (tmp_path / "database_split/subgroup_training.txt").write_text("patient0001\n")
    folder = tmp_path / "database_nifti/patient0001"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for view in ("2CH", "4CH"):
        pixels, label = rng.integers(0, 256, (30, 40, 5)), rng.integers(0, 4, (30, 40, 5))
        for name, values in (("", pixels), ("_gt", label)):
            image = nibabel.Nifti1Image(values.astype(np.uint8), np.eye(4))
            image.header.set_zooms((0.5, 0.25, 1.0))
            nibabel.save(image, folder / f"patient0001_{view}_half_sequence{name}.nii.gz")
    dataset = MaskedClips(str(tmp_path), "training", "camus", num_frames=5, size=None)
    assert len(dataset) == 2
    item = dataset[1]
    assert np.array_equal(item["inputs"][:, 0], pixels.transpose(2, 1, 0))
    assert np.array_equal(item["masks"], (label == 1).transpose(2, 1, 0))
    assert item["spacing"].tolist() == [0.25, 0.5]
    with pytest.raises(InputError, match="list of patients .*subgroup_testing.txt' not found; expected CAMUS as it is"):
        MaskedClips(str(tmp_path), "testing", "camus")
    (folder / "patient0001_4CH_half_sequence_gt.nii.gz").unlink()
    with pytest.raises(InputError, match="sequence 'patient0001_4CH_half_sequence' not found below"):
        MaskedClips(str(tmp_path), "training", "camus")


def test_echonet(tmp_path, video):
    """From one outlined frame to the other; the first chord of an outline is its long axis."""
    (tmp_path / "Videos").mkdir()
    video.rename(tmp_path / "Videos/X1.avi")

    def table(name, columns, rows):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    table("FileList.csv", ("FileName", "EF", "Split"), [("X1", 55, "TRAIN"), ("X2", 55, "TEST")])
    outline = [(10, 5, 10, 30), (8, 10, 20, 10), (8, 20, 20, 20)]
    rows = [("X1.avi", *chord, frame) for frame in (2, 6) for chord in outline]
    table("VolumeTracings.csv", ("FileName", "X1", "Y1", "X2", "Y2", "Frame"), rows)
    dataset = MaskedClips(str(tmp_path), "train", "echonet", num_frames=5, size=None)
    assert len(dataset) == 1
    item = dataset[0]
    brightness = item["inputs"].float().mean((1, 2, 3))
    assert (brightness - torch.tensor([60.0, 80, 100, 120, 140])).abs().max() < 4
    assert (item["masks"][1:4] == 255).all()
    assert item["masks"][0].nonzero().amin(0).tolist() == [10, 8]
    assert item["masks"][4].nonzero().amax(0).tolist() == [20, 20]
    with pytest.raises(InputError, match="holds no clip of part 'TEST'; expected layout 'echonet'"):
        MaskedClips(str(tmp_path), "TEST", "echonet")
    table("VolumeTracings.csv", ("FileName", "X"), [("X1", 1)])
    with pytest.raises(InputError, match=r"VolumeTracings.csv' lacks columns; expected FileName, X1, Y1"):
        MaskedClips(str(tmp_path), "TRAIN", "echonet")


def test_beating(tmp_path):
    """Shapes that grow and shrink, the same every time."""
    for name in ("one", "two"):
        beating(tmp_path / name)
    assert [len(list((tmp_path / "one" / part / "frames").iterdir())) for part in ("train", "val")] == [240, 40]
    files = sorted((tmp_path / "one/val").rglob("*.png"))
    assert len(files) == 800
    for file in files[::40]:
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    clip = MaskedClips(str(tmp_path / "one"), "val", size=None)[0]
    areas = clip["masks"].float().mean((1, 2))
    assert areas.min() > 0.02 and areas.max() / areas.min() > 1.1


def test_losses_are_of_the_frames_that_count():
    torch.manual_seed(0)
    clips, masks = [torch.randint(0, 255, (3, 1, 32, 32), dtype=torch.uint8)] * 2, torch.zeros(2, 3, 32, 32).byte()
    masks[:, :, 8:20, 8:20] = 1
    masks[0, 1] = 255
    losses = {}
    for frames in ("ends", "all"):
        model = ClipSegmenter("gdkvm_small_r18", frames=frames, num_points=32, **TINY).eval()
        losses[frames] = model(clips, list(masks), mode="loss")
    assert set(losses["all"]) == {"loss_ce", "loss_dice", "loss_auxiliary"}
    assert losses["all"]["loss_dice"] > 1.2 * losses["ends"]["loss_dice"] > 1
    unknown = model(clips, list(torch.full_like(masks, 255)), mode="loss")
    assert all(value == 0 for value in unknown.values())
    with pytest.raises(InputError, match="frames='some'; expected one of ends, all"):
        ClipSegmenter("gdkvm_small_r18", frames="some", **TINY)


def test_metrics_by_hand():
    """Two squares, one moved by two pixels of half a millimetre."""
    true, found = torch.zeros(2, 3, 20, 20, dtype=torch.bool)
    true[:, 5:15, 5:15], found[:, 5:15, 7:17] = True, True
    measured = ClipMetric.measure(found[0], true[0], [1.0, 0.5])
    assert measured["Dice"] == pytest.approx(80) and measured["IoU"] == pytest.approx(100 * 80 / 120)
    assert measured["HD95"] == pytest.approx(1.0) and 0 < measured["ASSD"] < 1
    found[0] = False
    masks, spacing = true.byte(), torch.tensor([1.0, 0.5])
    for frames, dice in (("ends", 40), ("all", 160 / 3), ("later", 80)):
        metric = ClipMetric(frames)
        metric.process(None, [(found, masks, spacing)])
        computed = metric.compute_metrics(metric.results)
        assert computed["Dice"] == pytest.approx(dice) and computed["HD95"] == pytest.approx(1.0)
    masks[2] = 255
    metric = ClipMetric("ends")
    metric.process(None, [(found, masks, spacing)])
    assert metric.results[0]["Dice"] == 0 and np.isnan(metric.results[0]["HD95"])


def test_train_test_predict(tiny, tmp_path, capsys):
    """The tools, one after the other; a clip's masks are of its own size, one for each frame."""
    train.main([tiny.config, "--work-dir", str(tmp_path / "run"), "--seed", "1"])
    weights = str(tmp_path / "run/export/model.safetensors")
    capsys.readouterr()
    test.main([tiny.config, str(tmp_path / "run/epoch_1.pth")])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"clip/Dice", "clip/IoU"} <= metrics.keys()
    mask = tmp_path / "first.png"
    Image.fromarray(np.kron(np.array([[0, 7], [3, 0]], np.uint8), np.ones((20, 24), np.uint8))).save(mask)
    inputs = str(tiny.inputs / "a")
    predict.main([tiny.config, weights, inputs, "--out", str(tmp_path / "out"), "--mask", str(mask)])
    [result] = json.loads((tmp_path / "out/predictions.json").read_text())
    assert result["count"] == 3
    for t in range(3):
        values = np.asarray(Image.open(Path(result["folder"], f"{t:06d}.png")))
        assert values.shape == (40, 48) and set(np.unique(values)) <= {0, 3, 7}


def test_streams_are_what_the_model_gives_at_once(tiny, video, tmp_path):
    weights = write_weights(tiny.config, tmp_path / "w.pth")
    predict.main([tiny.config, str(weights), str(video), "--out", str(tmp_path / "out")])
    task = build(load_config(tiny.config)).eval()
    task.weights().load_state_dict(torch.load(weights)["state_dict"])
    frames = torch.cat([task.prepare(frame, 32) for frame in stream_frames(video)], 1)
    with torch.inference_mode():
        logits = task.model(frames)[0][0]
    assert len(logits) == 9
    for t in range(9):
        found = np.asarray(Image.open(tmp_path / f"out/masks/heart/{t:06d}.png")) > 0
        expected = torch.nn.functional.interpolate(logits[t][None], (40, 48), mode="bilinear")[0].argmax(0).numpy() > 0
        assert (found == expected).mean() > 0.999


def test_bad_clips(tiny, video, tmp_path, capsys):
    """One line each; what was written before stays whole."""
    weights, out = write_weights(tiny.config, tmp_path / "w.pth"), tmp_path / "out"

    def refuse(inputs, *options):
        return refused(capsys, predict.main, tiny.config, weights, inputs, "--out", out, *options)

    for name, pixels, said in (
        ("empty.png", np.zeros((40, 48)), "empty.png' holds no object; expected pixels other than 0"),
        ("large.png", np.ones((20, 24)), "large.png' is 24 x 20; expected 48 x 40 as the first frame"),
    ):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
        assert said in refuse(video, "--mask", tmp_path / name)
    assert "is of one clip; expected one, got 2" in refuse(tiny.inputs, "--mask", tmp_path / "large.png")
    assert not list(out.rglob("*.png"))
    data = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    assert "cannot read video" in refuse(tmp_path / "cut.mp4")
    Image.new("L", (48, 40)).save(tiny.inputs / "a/0.png")
    Image.new("L", (50, 40)).save(tiny.inputs / "a/2.png")
    line = refuse(tiny.inputs / "a")
    assert "frame 2 is 50 x 40; expected 48 x 40 as the first" in line
    written = sorted(out.rglob("*.png"))
    assert len(written) == 2
    for file in written:
        assert np.asarray(Image.open(file)).shape == (40, 48)


def test_video_that_ends_early(tmp_path):
    """A file that promises more frames than it has."""
    path = tmp_path / "long.avi"
    rng = np.random.default_rng(0)
    write_video(path, rng.integers(0, 255, (40, 48, 64, 3), dtype=np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    count = 0
    with pytest.raises(InputError, match=r"long.avi'"):
        for frame in stream_frames(path):
            assert frame.shape == (48, 64, 3)
            count += 1
    assert 5 < count < 40


def test_bad_layouts(tiny, tmp_path, capsys):
    root = tmp_path / "data/masked"
    with pytest.raises(InputError, match="layout='avi'; expected one of folders, camus, echonet"):
        MaskedClips(str(root), "train", "avi")
    Image.new("L", (10, 10)).save(root / "train/masks/a/0.png")
    assert "0.png' is 10 x 10; expected 48 x 40 as its frame" in refused(capsys, train.main, tiny.config)
    for file in (root / "train/masks/a").iterdir():
        file.unlink()
    assert "a' has no mask in" in refused(capsys, train.main, tiny.config)
