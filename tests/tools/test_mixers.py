"""`linzoo mixers`: a table of what was asked for."""

import pytest

from linzoo.tools import mixers


def test_table(capsys):
    mixers.main(["--mixers", "attention", "ss2d", "--sizes", "32", "64", "--budget", "0.01", "--no-training"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["mixer", "params M", "GMACs", "images/s at 32", "images/s at 64", "time ~ tokens^"]
    assert [row[0] for row in rows] == ["attention", "ss2d"] and all(
        float(cell) > 0 for row in rows for cell in row[1:5]
    )


def test_accuracy_and_seconds(monkeypatch, tmp_path):
    """Of a run from its start; a run that goes on has no seconds of its own."""
    called = []

    def train(argv):
        called.append(argv)
        work_dir = tmp_path / "mixers/ss2d"
        (work_dir / "export").mkdir(parents=True, exist_ok=True)
        (work_dir / "export/config.json").write_text('{"top1": 97.5}')
        (work_dir / "epoch_1.pth").touch()

    monkeypatch.setattr(mixers, "WORK_DIR", tmp_path / "mixers")
    monkeypatch.setattr(mixers.train, "main", train)
    accuracy, seconds = mixers.digits("ss2d")
    assert accuracy == 97.5 and seconds is not None and "model.model_name=plain_ss2d_t" in called[0]
    assert mixers.digits("ss2d") == (97.5, seconds)
    (tmp_path / "mixers/ss2d/seconds.json").unlink()
    assert mixers.digits("ss2d") == (97.5, None)


def test_unknown_mixer(capsys):
    with pytest.raises(SystemExit):
        mixers.main(["--mixers", "conv"])
    assert "invalid choice: 'conv'" in capsys.readouterr().err
