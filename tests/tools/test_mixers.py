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


def test_trainings(monkeypatch, capsys):
    """One with each mixer; a run that goes on has no seconds of its own."""
    results = iter([(97.5, 12.3), (80.0, None)])
    called = []
    monkeypatch.setattr(mixers, "run", lambda *args: (called.append(args), next(results))[1])
    mixers.main(["--mixers", "wkv7", "s6", "--sizes", "32", "--budget", "0.01"])
    assert [args[1].name for args in called] == ["wkv7", "s6"]
    assert [args[3] for args in called] == ["model.model_name=plain_wkv7_t", "model.model_name=plain_s6_t"]
    rows = [line.split("|")[-3:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row] for row in rows[2:]] == [["97.50", "12"], ["80.00", "-"]]


def test_unknown_mixer(capsys):
    with pytest.raises(SystemExit):
        mixers.main(["--mixers", "conv"])
    assert "invalid choice: 'conv'" in capsys.readouterr().err
