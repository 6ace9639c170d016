"""Next-frame prediction: the model's states, losses and errors; training and testing by the tools; bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_bad_input import refused

import linzoo.backbones  # noqa: F401
from linzoo.tools import predict, test, train
from linzoo.tools.engine import NextFrame, NextFrameMetric

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(dims=(8, 8, 8), dim=8, depth=2, d_state=8, num_groups=2)
CONFIG = """
_base_ = [{base!r}]
model = dict(**{small!r})
train_dataloader = dict(dataset=dict(data_root={data!r}, make=None), batch_size=3)
val_dataloader = dict(dataset=dict(data_root={data!r}, make=None))
test_dataloader = dict(dataset=dict(data_root={data!r}, make=None))
max_epochs = 1
train_cfg = dict(max_epochs=1)
param_scheduler = []
"""


@pytest.fixture
def data(tmp_path):
    """Clips of a bright square that moves to the right."""
    for part, count in (("train", 6), ("val", 4)):
        clips = np.zeros((count, 8, 16, 16), np.uint8)
        for i, clip in enumerate(clips):
            for t, frame in enumerate(clip):
                frame[i % 8 : i % 8 + 4, t : t + 4] = 255
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / f"{part}.npy", clips)
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, data):
    path = tmp_path / "tiny.py"
    base = str(ROOT / "configs/video/convs5_bouncing.py")
    path.write_text(CONFIG.format(base=base, data=str(data), small=SMALL))
    return str(path)


def test_train_and_test(tmp_path, config, capsys):
    train.main([config, "--work-dir", str(tmp_path / "run"), "--seed", "1"])
    capsys.readouterr()
    test.main([config, str(tmp_path / "run" / "epoch_1.pth")])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    predict.main([config, str(tmp_path / "run/export/model.safetensors"), str(tmp_path / "data/val.npy"),
                  "--out", str(tmp_path / "out"), "--frames", "3"])  # fmt: skip
    frames = np.load(tmp_path / "out/frames/val.npy")
    assert frames.shape == (4, 3, 16, 16) and frames.dtype == np.uint8
    state = load_file(tmp_path / "run/export/model.safetensors")
    model = timm.create_model("convs5_video", **SMALL).eval()
    model.load_state_dict(state)
    seen = torch.from_numpy(np.load(tmp_path / "data/val.npy"))[:, :, None].float() / 127.5 - 1
    with torch.no_grad():
        expected = (model.generate(seen, 3)[:, :, 0] + 1) * 127.5
    assert np.abs(frames - expected.numpy()).max() <= 0.51
    clips = np.load(tmp_path / "data/val.npy") / 255.0
    copied = np.mean((clips[:, 4:-1] - clips[:, 5:]) ** 2)
    assert metrics["frame/copy_one_step"] == pytest.approx(copied, rel=1e-5)
    rollout = np.mean((clips[:, 4:5] - clips[:, 5:]) ** 2)
    assert metrics["frame/copy_rollout"] == pytest.approx(rollout, rel=1e-5)
    below = 100 * (1 - metrics["frame/one_step"] / metrics["frame/copy_one_step"])
    assert metrics["frame/below_copy"] == pytest.approx(below)


@pytest.mark.slow
def test_learns_to_beat_copying(data):
    torch.manual_seed(0)
    model = NextFrame("convs5_video", context=3, **SMALL | dict(dims=(16, 16), dim=16, d_state=32))
    clips = [torch.from_numpy(clip).unsqueeze(1) for clip in np.load(data / "train.npy")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = sum(model(clips, mode="loss").values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metric = NextFrameMetric()
    with torch.no_grad():
        metric.process(None, model(clips, mode="predict"))
    assert metric.compute_metrics(metric.results)["below_copy"] > 50


def test_generation_goes_on_from_the_states():
    model = timm.create_model("convs5_video", **SMALL).eval()
    frames = torch.rand(2, 5, 1, 8, 12) * 2 - 1
    with torch.no_grad():
        made = model.generate(frames, 3)
        seen = torch.cat([frames, made[:, :2]], 1)
        torch.testing.assert_close(model(seen)[0][:, 4:], made, rtol=1e-4, atol=1e-5)
    assert made.shape == (2, 3, 1, 8, 12)
    assert made.abs().max() <= 1


def test_the_future_is_not_seen():
    model = timm.create_model("convs5_video", **SMALL).eval()
    frames = torch.rand(1, 6, 1, 8, 8)
    later = frames.clone()
    later[:, 4:] = 0
    torch.testing.assert_close(model(later)[0][:, :4], model(frames)[0][:, :4])


def test_bad_input(config, data, capsys):
    model = timm.create_model("convs5_video", **SMALL)
    with pytest.raises(ValueError, match=r"frames: expected \(B, T, 1, H, W\), got \(2, 5, 3, 8, 8\)"):
        model(torch.zeros(2, 5, 3, 8, 8))
    with pytest.raises(ValueError, match="frames: expected sides that are multiples of 4"):
        model(torch.zeros(2, 5, 1, 8, 10))
    np.save(data / "val.npy", np.zeros((3, 4, 5)))
    assert "float64 (3, 4, 5); expected uint8 of four axes" in refused(capsys, train.main, config)
    (data / "train.npy").unlink()
    assert "train.npy' not found" in refused(capsys, train.main, config)


@pytest.mark.parametrize("memory_format", (torch.channels_last, torch.channels_last_3d))
def test_memory_formats(memory_format):
    model = timm.create_model("convs5_video", **SMALL).eval()
    x = torch.rand(1, 3, 1, 16, 16)
    with torch.inference_mode():
        y = model(x)[0]
        torch.testing.assert_close(model.to(memory_format=memory_format)(x)[0], y, rtol=1e-4, atol=1e-4)
