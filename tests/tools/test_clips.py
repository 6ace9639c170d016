"""Classification of clips: frames and videos read, trained on and predicted; bad input."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import write_task
from test_bad_input import refused

from linzoo.tools import predict, test, train
from linzoo.tools.engine import ClipClassifier, ClipFolder, InputError
from linzoo.tools.engine.clips import find_clips, read_clip


@pytest.fixture
def tiny(tmp_path):
    return write_task("clips", tmp_path)


def write_frames(folder, levels, size=(8, 12)):
    folder.mkdir(parents=True)
    for i, level in enumerate(levels):
        Image.new("RGB", size[::-1], (level, 0, 0)).save(folder / f"{i:03}.png")
    return folder


def test_frames_are_spread_over_the_clip(tmp_path):
    clip = write_frames(tmp_path / "clip", range(0, 100, 10))
    frames = read_clip(clip, 5)
    assert frames.shape == (5, 3, 8, 12) and frames.dtype == torch.uint8
    assert frames[:, 0, 0, 0].tolist() == [10, 30, 50, 70, 90]
    some = {tuple(read_clip(clip, 5, anywhere=True)[:, 0, 0, 0].tolist()) for _ in range(20)}
    assert len(some) > 1
    assert all(20 * i <= level <= 20 * i + 10 for levels in some for i, level in enumerate(levels))


@pytest.mark.parametrize("package", ["av", "torchcodec"])
def test_videos_are_read(tmp_path, package):
    pytest.importorskip(package)
    av = pytest.importorskip("av")  # writes the file
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(8):
            pixels = np.full((32, 32, 3), 30 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    assert find_clips(tmp_path) == [path]
    levels = read_clip(path, 4).float().mean((1, 2, 3))
    np.testing.assert_allclose(levels.numpy(), [30, 90, 150, 210], atol=8)


def test_train_test_and_predict(tiny, tmp_path, capsys):
    train.main([tiny.config, "--work-dir", str(tmp_path / "run"), "--seed", "1"])
    capsys.readouterr()
    test.main([tiny.config, str(tmp_path / "run/epoch_1.pth")])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= metrics["accuracy/top1"] <= 100
    predict.main([tiny.config, str(tmp_path / "run/epoch_1.pth"), str(tiny.inputs), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(results) == 6 and {r["label"] for r in results} <= set("abc")
    right = np.mean([r["path"].split("/")[-2] == r["label"] for r in results])
    assert 100 * right == pytest.approx(metrics["accuracy/top1"], abs=1e-3)


@pytest.mark.slow
def test_learns_which_way_a_square_moves():
    """Single frames do not tell: positions in time must."""
    torch.manual_seed(0)
    model = ClipClassifier("videomamba_t_video", num_classes=2, num_frames=4, img_size=32, dim=32, depth=2)
    clips = torch.zeros(16, 3, 4, 32, 32, dtype=torch.uint8)
    for i, clip in enumerate(clips):
        for t in range(4):
            column = 8 * (t if i % 2 else 3 - t)
            clip[:, t, 8 * (i // 2 % 4) : 8 * (i // 2 % 4) + 8, column : column + 8] = 255
    labels = torch.arange(16) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(list(clips)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(list(clips)).argmax(1) == labels).all()


def test_bad_clips(tiny, tmp_path, capsys, monkeypatch):
    short = write_frames(tmp_path / "short", [0, 0])
    with pytest.raises(InputError, match="short' has 2 frames; expected at least num_frames=8"):
        read_clip(short, 8)
    mixed = write_frames(tmp_path / "mixed", [0, 0])
    Image.new("RGB", (5, 5)).save(mixed / "9.png")
    with pytest.raises(InputError, match="cannot read clip .*mixed'; .* of one size"):
        read_clip(mixed, 3)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for name in ("av", "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="needs a decoder: pip install av"):
        read_clip(tmp_path / "a.mp4", 1)
    with pytest.raises(InputError, match="is of kind 'backbone'; expected .* such as 'videomamba_t_video'"):
        ClipClassifier("videomamba_t")
    with pytest.raises(InputError, match=r"has no reset_classifier\(\); expected .* such as 'videomamba_t_video'"):
        ClipClassifier("convs5_video")
    empty = tmp_path / "root/val/a"
    empty.mkdir(parents=True)
    with pytest.raises(InputError, match="holds no clip; expected video files ending in"):
        ClipFolder(str(tmp_path / "root"), "val", 2, 32)
    said = refused(capsys, train.main, tiny.config, "--cfg-options", "model.num_classes=7")
    assert "config key model.num_classes=7" in said and "has 3 class folders" in said
