"""`linzoo quantize`: the table, the checkpoint and who takes it; what does not fit is said in one line."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_bad_input import refused
from test_make_data import few_digits

import linzoo.backbones  # noqa: F401
from linzoo.tools import cli, export, outliers, predict, quantize
from linzoo.tools import test as evaluate
from linzoo.tools.engine.weights import load_weights

CONFIG = "cls/groupmamba_t_digits"
NOT_ROUNDED = "checkpoint 'out/quantized.pth' is quantised: its weights are rounded, what layers read is not"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the digits, six of a class held out, and random weights of the config's model."""
    monkeypatch.chdir(tmp_path)
    few_digits("data/digits")
    torch.manual_seed(0)
    model = timm.create_model("groupmamba_t", num_classes=10)
    with torch.no_grad():
        model.head.weight *= 20
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": list("0123456789")}}}, "w.pth")
    return tmp_path


def rows(said):
    """The cells of the table, by the first column."""
    lines = [line.split("  ") for line in said.splitlines() if line.startswith("  ")]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: [float(x) for x in row[1:]] for row in cells if len(row) > 3 and row[0] != "weights"}


def run(*options):
    quantize.main([CONFIG, "w.pth", "--calib", "data/digits/train", "--images", "8", "--out", "out", *options])


@pytest.mark.slow
@pytest.mark.parametrize("method, bits", [("minmax", "w8a8"), ("repq", "w4a8"), ("mambaquant", "w8")])
def test_checkpoint_serves_the_other_tools(folder, capsys, method, bits):
    run("--method", method, "--bits", bits, "--test", "data/digits/val")
    said = capsys.readouterr().out
    found = rows(said)
    assert list(found) == ["float", f"{bits}, simulated", "weights alone"]
    (full, *zero), (packed, error, same, accuracy), plain = found.values()
    assert zero[:2] == [0, 100] and packed < full / (4 if bits == "w4a8" else 3)
    assert 0 < error < (0.5 if bits != "w4a8" else 3) and plain[1] > 0
    assert "over 60 images of data/digits/val" in said
    content = torch.load("out/quantized.pth", weights_only=True)
    facts = content["quantization"]
    assert (facts["method"], facts["bits"], facts["images"]) == (method, bits, 8)
    assert bool(facts["ranges"]) == (bits != "w8")
    assert content["meta"]["dataset_meta"]["classes"] == list("0123456789")
    evaluate.main([CONFIG, "out/quantized.pth"])
    said, noted = capsys.readouterr()
    metrics = json.loads(said.splitlines()[-1])
    assert ("quantized.pth' is quantised: the inputs of " in noted) == (bits != "w8") and NOT_ROUNDED not in noted
    assert metrics["accuracy/top1"] == pytest.approx(accuracy, abs=0.01)
    predict.main([CONFIG, "out/quantized.pth", "data/digits/val/3", "--out", "seen"])
    labels = json.loads((folder / "seen/predictions.json").read_text())
    assert len(labels) == len(list((folder / "data/digits/val/3").iterdir()))
    capsys.readouterr()
    export.main([CONFIG, "out/quantized.pth", "--format", "torch", "--size", "32", "32", "--out", "made"])
    assert (folder / "made/model.pt2").exists() and (NOT_ROUNDED in capsys.readouterr().err) == (bits != "w8")


def test_of_a_name(folder, capsys):
    """Without labels the calibration images are compared."""
    torch.save(timm.create_model("efficientvmamba_t").state_dict(), "t.pth")
    options = ("--calib", "data/digits/val/0", "--images", "2", "--out", "out", "--method", "smooth")
    cli.main(["quantize", "efficientvmamba_t", "t.pth", *options])
    said, noted = capsys.readouterr()
    assert "over the 2 calibration images" in said and len(rows(said)) == 3
    assert "scans' x_proj read inputs that are not rounded" in noted
    assert set(torch.load("out/quantized.pth", weights_only=True)) == {"state_dict", "meta", "quantization"}


def test_several_are_compared(config, data, capsys):
    """Of each method and number of bits the mean over checkpoints; what does not apply is named and left out."""
    file = config('model = dict(type="Classifier", model_name="test_vit", num_classes=3, img_size=32)')
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), data / f"{seed}.pth")
    checkpoints = [str(data / f"{seed}.pth") for seed in range(2)]
    options = ("--calib", str(data / "train"), "--images", "4", "--test", str(data / "val"))
    methods = ("--method", "minmax", "quamba2", "--bits", "w8a8", "w4a16", "--rounding", "nearest", "gptq")
    quantize.main([file, *checkpoints, *methods, *options])
    said, noted = capsys.readouterr()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    found = {line[0]: line[1:] for line in lines[2:]}
    names = [f"{bits}, minmax, {rounding}" for bits in ("w8a8", "w4a16") for rounding in ("nearest", "gptq")]
    assert list(found) == ["float", *names] and "over 6 images of" in said and "mean of 2 checkpoints" in said
    assert "quamba2 needs a family that declares the channels of its scans, got 'test_vit'" in noted
    errors = {name: float(cells[1].split()[0]) for name, cells in found.items()}
    assert 0 == errors["float"] < errors[names[0]] < errors[names[2]] and " to " in found["float"][0]
    for argv, line in (
        ((*options, "--out", "out"), "--out out, --test"),
        (options[:4], "--test None: several are compared; expected only --test"),
    ):
        assert line in refused(capsys, quantize.main, file, *checkpoints, *argv)
    assert "--out is missing; expected a folder" in refused(capsys, quantize.main, file, checkpoints[0], *options)


@torch.no_grad()
def test_simulation_of_another_model(folder, capsys):
    """A file whose `simulation` belongs to another model, or that has none, as older ones."""
    run("--method", "minmax")
    model = timm.create_model("groupmamba_t", num_classes=10)
    content = torch.load("out/quantized.pth", weights_only=True)
    state, how = content["state_dict"], content["quantization"]["simulation"]
    how["inputs"]["gone.fc"] = how["inputs"].pop("head")
    torch.save(content, "wrong.pth")
    with pytest.raises(quantize.InputError, match="simulation: expected that of 'groupmamba_t', got another"):
        load_weights(model, "wrong.pth", simulated=True)
    del content["quantization"]["simulation"]
    torch.save(content, "old.pth")
    with pytest.warns(UserWarning, match="'old.pth' is quantised: its weights are rounded, what layers read is not"):
        load_weights(model, "old.pth", simulated=True)
    assert torch.equal(model.head.weight, state["head.weight"]) and not model.head._forward_pre_hooks


def grey(path, value, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), value, np.uint8)).save(path)


def test_bad_input(folder, capsys):
    for i in range(3):
        grey(folder / f"alike/{i}.png", 9)
    torch.save({"state_dict": {"a": torch.ones(1)}, "quantization": {}}, "q.pth")
    (folder / "broken.pth").write_bytes(b"no weights")
    digits = ("--calib", "data/digits/train", "--images", "2")
    for argv, line in (
        ((CONFIG, "q.pth", *digits), "CHECKPOINT 'q.pth' is quantised already; expected one of floating-point weights"),
        ((CONFIG, "broken.pth", *digits), "checkpoint 'broken.pth' cannot be read"),
        ((CONFIG, "none.pth", *digits), "checkpoint 'none.pth': no such file"),
        ((CONFIG, *digits), f"MODEL '{CONFIG}' is a config: CHECKPOINT is missing"),
        (("restore/mambair_dn_sigma15", "w.pth", *digits), "trains a Restorer; expected a config of a classifier"),
        (("vim_z", "w.pth", *digits), "MODEL 'vim_z': no such model"),
        ((CONFIG, "w.pth", "--calib", "none"), "--calib 'none': no such folder; expected one of images"),
        ((CONFIG, "w.pth", "--calib", "alike"), "--calib 'alike' holds 3 images; expected 32, or a smaller --images"),
        ((CONFIG, "w.pth", "--calib", "alike", "--images", "3"), "--calib 'alike': the 3 images are all alike"),
        ((CONFIG, "w.pth", "--calib", "alike", "--images", "1"), "--images 1: expected at least 2"),
        ((CONFIG, "w.pth", *digits, "--test", "alike"), "data folder 'alike' holds no class folder"),
        ((CONFIG, "w.pth", *digits, "--test", "data/digits"), "--test 'data/digits' has 2 class folders; expected 10"),
        ((CONFIG, "w.pth", *digits, "--method", "quamba2"), "quamba2 needs a family that declares the channels of its"),
        (("resnet10t", *digits), "--method mambaquant: method: mambaquant needs a family that declares invariances"),
    ):
        assert line in refused(capsys, quantize.main, *argv, "--out", folder / "out"), argv
        assert not (folder / "out").exists()
    assert "--seeds 0: expected at least 1" in refused(capsys, outliers.main, "--seeds", "0")


def test_images_of_other_sizes(tmp_path):
    """What prepares images may leave them as they are."""
    grey(tmp_path / "a.png", 1, 8)
    grey(tmp_path / "b.png", 2, 9)

    def prepare(files):
        return [torch.from_numpy(np.array(Image.open(file)))[None, None].float() for file in files]

    with pytest.raises(quantize.InputError, match="holds images of 8 x 8 and 9 x 9; expected one size"):
        quantize.calibration(str(tmp_path), 2, prepare)


@pytest.mark.slow
def test_outliers_prints_a_table(capsys):
    outliers.main(["--seeds", "1", "--weight-bits", "8"])
    said = capsys.readouterr().out
    assert all(name.split(",")[0] in said for name in outliers.METHODS) and "of 1 seeds" in said
