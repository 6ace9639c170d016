"""`linzoo prune`: the tables, the checkpoint and who takes it; fine-tuning keeps its zeros."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_bad_input import refused
from test_finetune import run as finetuned
from test_finetune import write_classes
from test_make_data import few_digits

from linzoo.quantization.prune import PRUNINGS
from linzoo.tools import cli, export, finetune, predict, prune
from linzoo.tools import test as evaluate


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A working folder with random weights of a small ViT of three classes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), "w.pth")
    return tmp_path


@pytest.mark.parametrize("method", [m if m == "dimap" else pytest.param(m, marks=pytest.mark.slow) for m in PRUNINGS])
def test_fine_tuning_keeps_zeros(weights, capsys, method):
    data = write_classes(weights / "data")
    torch.save(timm.create_model("test_vit").state_dict(), "w.pth")
    cli.main(["prune", "test_vit", "w.pth", "--method", method, "--ratio", "0.5", "--out", "out"])
    said = capsys.readouterr().out
    assert "channel mixers" in said and "out/pruned.pth" in said and "accuracy" not in said
    written = torch.load("out/pruned.pth", weights_only=True)
    facts, state = written["pruning"], written["state_dict"]
    assert (facts["method"], facts["ratio"]) == (method, 0.5)
    options = ("--weights", "out/pruned.pth", "--size", "160")
    finetuned("test_vit", data, weights / "run", *options)
    assert "--weights 'out/pruned.pth' is pruned: its zeros stay" in capsys.readouterr().err
    trained = timm.create_model(f"local-dir:{weights}/run/export", pretrained=True).state_dict()
    moved = 0
    for name in facts["names"]:
        zeros = state[name] == 0
        assert not trained[name][zeros].any(), name
        moved += int((trained[name] != state[name]).sum())
    assert moved > 1000


@pytest.mark.slow
def test_checkpoint_serves_the_other_tools(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = "cls/groupmamba_t_digits"
    few_digits("data/digits")
    torch.save(timm.create_model("groupmamba_t", num_classes=10).state_dict(), "w.pth")
    prune.main([config, "w.pth", "--ratio", "0.4", "--test", "data/digits/val", "--out", "out"])
    said = capsys.readouterr().out
    [row] = [line.split() for line in said.splitlines() if line.strip().startswith("pruned.pth")]
    assert "over 60 images of data/digits/val" in said and float(row[1]) > 0
    evaluate.main([config, "out/pruned.pth"])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["accuracy/top1"] == pytest.approx(float(row[2]), abs=0.01)
    predict.main([config, "out/pruned.pth", "data/digits/val/3", "--out", "seen"])
    export.main([config, "out/pruned.pth", "--format", "torch", "--size", "32", "32", "--out", "made"])
    assert (tmp_path / "made/model.pt2").exists() and (tmp_path / "seen/predictions.json").exists()


def test_several_are_compared_and_trained(config, data, tmp_path, capsys):
    """Of each method and ratio the mean over checkpoints, also after training by the config, which keeps the zeros."""
    file = config('model = dict(type="Classifier", model_name="test_vit", num_classes=3, img_size=32)')
    checkpoints = [str(tmp_path / f"{seed}.pth") for seed in range(2)]
    for checkpoint in checkpoints:
        torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), checkpoint)
    options = ("--test", str(data / "val"), "--epochs", "1")
    prune.main([file, *checkpoints, "--method", "dimap", "channels", "--ratio", "0.3", *options])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found = {name.strip(): [float(cell.split()[0]) for cell in cells if cell.strip()] for name, *cells in lines[2:]}
    assert list(found) == ["all weights", "dimap, 0.3", "channels, 0.3"]
    assert [len(row) for row in found.values()] == [2, 2, 2]
    prune.main([file, checkpoints[0], "--ratio", "0.5", "--out", str(tmp_path / "out"), *options])
    assert "after --epochs 1: " in capsys.readouterr().out
    pruned = torch.load(tmp_path / "out/pruned.pth", weights_only=True)
    trained = load_file(tmp_path / "out/trained/export/model.safetensors")
    for name in pruned["pruning"]["names"]:
        kept = pruned["state_dict"][name] != 0
        assert not trained[name][~kept].any() and (trained[name] != pruned["state_dict"][name])[kept].any()
    for argv, line in (
        (
            ("test_vit", "--ratio", "0.5", "--epochs", "1"),
            "--epochs 1, MODEL 'test_vit': expected a positive number and",
        ),
        ((file, "--ratio", "0.5", "--epochs", "-1"), "--epochs -1, MODEL"),
        ((file, "--ratio", "0.3", "0.5", "--out", "out"), "--out out, --test None: several are compared"),
        ((file, "--ratio", "0.3"), "--out is missing; expected a folder to write to"),
    ):
        assert line in refused(capsys, prune.main, *argv)


def test_bad_input(weights, capsys):
    data = write_classes(weights / "data")
    torch.save(timm.create_model("test_byobnet").state_dict(), "b.pth")
    torch.save(timm.create_model("test_vit").state_dict(), "v.pth")
    for argv, line in (
        (("test_vit", "v.pth", "--ratio", "1"), "--ratio 1: expected more than 0 and less than 1"),
        (("test_vit", "v.pth", "--ratio", "nan"), "--ratio nan: expected more than 0"),
        (("test_byobnet", "b.pth", "--ratio", "0.5"), "--method dimap: model: expected projections of mixers or MLPs"),
        (("test_byobnet", "b.pth", "--ratio", "0.5", "--method", "channels"), "expected a family that declares inner"),
        (
            ("test_vit", "v.pth", "--ratio", "0.5", "--test", data),
            "has 3 class folders; expected 1000",
        ),
        (("test_vit", "none.pth", "--ratio", "0.5"), "none.pth"),
    ):
        assert line in refused(capsys, prune.main, *argv, "--out", weights / "out"), argv
        assert not (weights / "out").exists()


def test_hook_refuses_other_files(weights, capsys):
    from linzoo.tools.engine import SparseHook

    with pytest.raises(finetune.InputError, match="checkpoint='w.pth' is not pruned; expected one of `linzoo prune`"):
        SparseHook("w.pth")
    with pytest.raises(finetune.InputError, match="checkpoint='none.pth' cannot be read"):
        SparseHook("none.pth")
