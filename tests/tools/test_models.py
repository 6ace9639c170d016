"""The list of the zoo: measured costs agree with the published ones, and the figures add up."""

import csv
import io

import pytest
import torch
from torch import nn

from linzoo.backbones import kind_of, list_models
from linzoo.backbones.published import PUBLISHED
from linzoo.tools import models

TOLERANCE = 0.03
ALL = list_models(kind=None)


def off(measured, published):
    return published is not None and abs(measured - published) > TOLERANCE * published


@pytest.mark.parametrize("name", ALL)
def test_costs_agree_with_the_published_ones(name):
    row, published = models.describe(name), PUBLISHED.get(name)
    assert row["params_m"] > 0
    assert row["gmacs"] is None if kind_of(name) == "occupancy" else row["gmacs"] > 0
    if published:
        assert published.source
        differs = off(row["params_m"], published.params_m) or off(row["gmacs"], published.gmacs)
        assert differs == bool(published.note), (
            f"measured {row['params_m']} M and {row['gmacs']} GMACs, published {published}: "
            "a difference of over 3 % needs a note that says why, a smaller one needs none"
        )


def test_published_names_are_registered():
    assert set(PUBLISHED) <= set(ALL)


def test_known_model():
    """ResNet-18: 11,689,512 parameters and 1.81 GMACs at 224, the figures that everybody prints."""
    params, macs = models.measure("resnet18")
    assert params == 11_689_512
    assert abs(macs - 1.814e9) < 0.002e9


def test_scan_counts_by_its_formula(monkeypatch):
    """Our operators' formulas enter without halving: 9 L D N + L D per scan."""
    from linzoo.ops import selective_scan

    class Scan(nn.Module):
        in_chans = 3

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2).unsqueeze(2)  # (1, L, 1, 3)
            A, D, B = tokens.new_ones(1, 3, 2), tokens.new_ones(1, 3), tokens.new_ones(*tokens.shape[:3], 2)
            return selective_scan(tokens, tokens, A, B, B, D)

    monkeypatch.setattr(models, "create", lambda *args, **kwargs: Scan())
    assert models.measure("scan", size=8) == (0, 64 * 3 * (9 * 2 + 1))


def test_fixed_input_size():
    assert models.measure("vit_tiny_patch16_224", 112)[1] < models.measure("vit_tiny_patch16_224", 224)[1]


def test_csv(capsys):
    name = list_models()[0]
    models.main([name, "--csv"])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["name"] == name
    assert float(row["params_m"]) == round(sum(p.numel() for p in model_parameters(name)) / 1e6, 2)


def test_table_names_every_model(capsys):
    models.main(["*_t*"])
    out = capsys.readouterr().out
    assert all(name in out for name in list_models("*_t*"))


def test_dense_models(capsys):
    """Listed like the others, at the size that they are made for; their authors' figures are no top-1."""
    models.main(["*vm_unet", "vm_*", "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["mhs_vm_unet", "vm_unet"]
    assert [(row["params_m"], row["size"], row["top1"], row["license"]) for row in rows] == [
        ("17.26", "256", "", "-"),
        ("27.43", "256", "", "-"),
    ]


def test_unknown_filter(capsys):
    with pytest.raises(SystemExit) as error:
        models.main([list_models()[0], "no_such_model*"])
    assert error.value.code == 2
    assert "no_such_model*" in capsys.readouterr().err


def model_parameters(name):
    with torch.device("meta"):
        return list(models.create(name, 224).parameters())
