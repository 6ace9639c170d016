"""`linzoo look`: the signs of a model's scans, by layer; what is not there is said in one line."""

import json

import pytest
import timm
from safetensors.torch import save_file
from test_bad_input import refused
from torch.nn.utils import parametrize

import linzoo.backbones  # noqa: F401
from linzoo.backbones.layers import definite_projection
from linzoo.backbones.layers.dynamics import scans_of
from linzoo.tools import look


@pytest.mark.parametrize("sign", ["positive", "negative", "mixed"])
def test_dynamics_of_a_file(sign, tmp_path, capsys):
    """A model whose projections were of one sign has eigenvalues of that sign; half of each where they were mixed."""
    model = definite_projection(timm.create_model("mambavision_t"), sign)
    scans = scans_of(model)
    for layer in scans.values():
        parametrize.remove_parametrizations(layer, "x_proj")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    look.main(["mambavision_t", str(tmp_path / "w.safetensors"), "--what", "dynamics", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in rows] == list(scans)
    expected = {"positive": (8, 0), "negative": (0, 8), "mixed": (4, 4)}[sign]
    for row in rows:
        assert (row["positive"], row["negative"]) == expected
        assert row["scenario"] == ("convergent" if sign == "negative" else "divergent")
        assert row["smallest"] <= row["largest"]
    look.main(["mambavision_t", str(tmp_path / "w.safetensors"), "--what", "dynamics"])
    said = capsys.readouterr().out
    summed = f"{expected[0] * len(rows)} positive and {expected[1] * len(rows)} negative eigenvalues"
    assert summed in said and all(name in said for name in scans)


def test_scans_of_several_routes(capsys):
    look.main(["tsm2", "--what", "dynamics", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["scan"] for row in rows] == [0, 0, 1] * 2


def test_bad_input(capsys):
    assert "has no selective scan (S6)" in refused(capsys, look.main, "kat_tiny_patch16_224", "--what", "dynamics")
    assert "no such model" in refused(capsys, look.main, "vmamba_x", "--what", "dynamics")
    assert "checkpoint 'no.pth'" in refused(capsys, look.main, "vim_t", "no.pth", "--what", "dynamics")
    with pytest.raises(SystemExit):
        look.main(["vim_t"])
    assert "--what" in capsys.readouterr().err
