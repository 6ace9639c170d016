"""TSM2 and the task of forecasting: properties that the paper's formulas have, windows, files, bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from linzoo.backbones.tsm2 import SelectiveMixer
from linzoo.tools import predict, test, train
from linzoo.tools.engine.forecasting import Series, read_series

SMALL = dict(context=32, horizon=8, patch_size=8, stride=4, dim=16, drop_rate=0.0)


def write_series(path: Path, rows: int, variates: int = 3) -> None:
    """Hours of three waves with noise, in ETT's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, t = np.random.default_rng(0), np.arange(rows)
    waves = [np.sin(2 * np.pi * (t / period + phase)) for period, phase in ((12, 0.0), (8, 0.3), (24, 0.1))][:variates]
    values = np.stack(waves, 1) * [3.0, 1.0, 10.0][:variates] + [5.0, 0.0, 100.0][:variates]
    values += rng.normal(0, 0.05, values.shape)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "HUFL", "MUFL", "OT"][: variates + 1])
        for i, row in enumerate(values):
            writer.writerow([f"2016-07-{1 + i // 24 % 28:02d} {i % 24:02d}:00:00", *row])


# --- the model ------------------------------------------------------------------------------------------------------


def test_time_is_causal_and_variates_are_not():
    x = torch.randn(2, 9, 16)
    later = x.clone()
    later[:, 6:] = 0
    with torch.no_grad():
        forth, both = SelectiveMixer(16, 1), SelectiveMixer(16, 2)
        torch.testing.assert_close(forth(later)[:, :6], forth(x)[:, :6])
        assert not torch.allclose(both(later)[:, :6], both(x)[:, :6])


def test_order_of_variates_counts_in_their_scan_alone():
    model = timm.create_model("tsm2", **SMALL).eval()
    x, order = torch.randn(2, 5, 32), torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        assert not torch.allclose(model(x[:, order]), model(x)[:, order], atol=1e-3)
        for block in model.blocks:
            torch.nn.init.zeros_(block.variate_mixer.out_proj.weight)
        torch.testing.assert_close(model(x[:, order]), model(x)[:, order])


def test_units_do_not_count():
    """A variate in other units has its forecast in these."""
    model, x = timm.create_model("tsm2", **SMALL).eval(), torch.randn(1, 3, 32)
    scale, shift = torch.tensor([2.0, 0.5, 10.0]).view(1, 3, 1), torch.tensor([1.0, -4.0, 100.0]).view(1, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x * scale + shift), model(x) * scale + shift, rtol=1e-3, atol=1e-3)
        constant = torch.full((1, 3, 32), 7.0)
        torch.testing.assert_close(model(constant), torch.full((1, 3, 8), 7.0), rtol=1e-3, atol=1e-3)


def test_what_is_known_beside_the_series():
    model, x = timm.create_model("tsm2", static_dim=3, future=(8, 2), **SMALL), torch.randn(2, 5, 32)
    static, future = torch.randn(2, 5, 3), torch.randn(2, 5, 8, 2)
    y = model(x, static, future)
    assert y.shape == (2, 5, 8)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not torch.allclose(model(x, static, 0 * future), y) and not torch.allclose(model(x, 0 * static, future), y)
    with pytest.raises(ValueError, match=r"static: expected \(B, M, C\) that ends with 3, got None"):
        model(x)


def test_bad_series():
    for name, value in (("context", 0), ("depth", 0), ("stride", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got {value}"):
            timm.create_model("tsm2", **{**SMALL, name: value})
    with pytest.raises(ValueError, match="patch_size: expected at most the context of 32 steps, got 40"):
        timm.create_model("tsm2", **{**SMALL, "patch_size": 40})
    model = timm.create_model("tsm2", **SMALL)
    with pytest.raises(ValueError, match=r"x: expected \(B, M, T\) that ends with 32, got \(2, 3, 31\)"):
        model(torch.zeros(2, 3, 31))
    with pytest.raises(ValueError, match=r"future: expected None, got \(1, 2, 3, 4\)"):
        model(torch.zeros(1, 2, 32), future=torch.zeros(1, 2, 3, 4))


# --- the task -------------------------------------------------------------------------------------------------------


def test_windows(tmp_path):
    """Scaled by the training rows; what is foretold lies in the part, each step of it."""
    write_series(tmp_path / "s.csv", 100)
    table = read_series(tmp_path / "s.csv")
    assert table.names == ["HUFL", "MUFL", "OT"] and table.values.shape == (100, 3)
    settings = dict(data_root=str(tmp_path), file="s.csv", context=10, horizon=5, rows=(50, 20, 25))
    parts = {part: Series(part=part, **settings) for part in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [36, 16, 21]
    mean, deviation = table.values[:50].mean(0), table.values[:50].std(0)
    first = parts["val"][0]
    assert first["inputs"].shape == (3, 10) and first["targets"].shape == (3, 5)
    np.testing.assert_allclose(first["targets"].numpy().T * deviation + mean, table.values[50:55], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        parts["test"][20]["targets"].numpy().T * deviation + mean, table.values[90:95], atol=1e-3
    )


CONFIG = """
_base_ = [{base!r}]
model = dict(context=48, horizon=12, patch_size=8, stride=4, dim=16, drop_rate=0.0)
settings = dict(data_root={root!r}, file="s.csv", context=48, horizon=12, rows=(400, 100, 100))
train_dataloader = dict(batch_size=16, num_workers=0, persistent_workers=False, dataset=dict(part="train", **settings))
val_dataloader = dict(num_workers=0, dataset=dict(part="val", **settings))
test_dataloader = dict(dataset=dict(part="test", **settings))
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(max_epochs=3)
"""
BASE = str(Path(__file__).resolve().parents[2] / "configs/forecast/tsm2_etth1.py")


@pytest.fixture
def config(tmp_path):
    write_series(tmp_path / "data/s.csv", 600)
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(base=BASE, root=str(tmp_path / "data")))
    return file


def test_learns_waves(config, tmp_path, capsys):
    """Waves with little noise: far better than the last value kept; forecasts in the units and dates of the file."""
    train.main([str(config), "--work-dir", str(tmp_path / "w")])
    weights = str(tmp_path / "w/export/model.safetensors")
    capsys.readouterr()
    test.main([str(config), weights])
    metrics = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert metrics["forecast/MSE"] < 0.25 * metrics["forecast/last_MSE"]
    assert metrics["forecast/MAE"] < 0.6 * metrics["forecast/last_MAE"]
    predict.main([str(config), weights, str(tmp_path / "data/s.csv"), "--out", str(tmp_path / "out")])
    [found] = json.loads((tmp_path / "out/predictions.json").read_text())
    made, seen = read_series(found["forecast"]), read_series(tmp_path / "data/s.csv")
    assert made.names == seen.names and made.values.shape == (12, 3)
    assert made.dates[0] == "2016-07-26 00:00:00" and made.dates[11] == "2016-07-26 11:00:00"
    assert abs(made.values[:, 2] - 100).max() < 15
    assert (tmp_path / "out/predictions.png").stat().st_size > 0


def test_bad_files(config, tmp_path, capsys):
    from test_bad_input import refused

    def refusal(*options):
        line = refused(capsys, train.main, config, "--work-dir", tmp_path / "w", *options)
        assert not (tmp_path / "w").exists()
        return line

    file = tmp_path / "data/s.csv"
    good = file.read_text()
    assert "model.horizon=24: the data set has 12" in refusal("--cfg-options", "model.horizon=24")
    assert "has 600 rows, part 'test'" in refusal("--cfg-options", "test_dataloader.dataset.rows=(400,100,200)")
    assert "part='dev'" in refusal("--cfg-options", "val_dataloader.dataset.part=dev")
    for wrong, said in (
        (good.replace("date", "time"), "begins with ['time', 'HUFL']; expected the columns date"),
        (good.replace("2016-07-02 00:00:00,", "2016-07-02 00:00:00,x,"), "row 26: ['x', "),
        (good + "2016-08-01 00:00:00,nan,1,2\n", "row 602: ['nan', '1', '2']; expected finite numbers"),
        ("", "begins with []; expected"),
    ):
        file.write_text(wrong)
        assert said in refusal()
    file.unlink()
    assert "cannot read series" in refusal() and "No such file" in refusal()
    with pytest.raises(SystemExit):
        predict.main([str(config), "nothing.pth", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
