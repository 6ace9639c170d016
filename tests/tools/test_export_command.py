"""Models written for other programs by `linzoo export`."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linzoo.tools import cli, export


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        export.main(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("test_byobnet", (64, 96)), ("vssd_m", (64, 64))])
def test_onnx_of_any_size(tmp_path, capsys, name, size):
    """The file that ONNX Runtime reads equals the model at another batch, height and width."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = ("--size", *map(str, size), "--dynamic", "batch,height,width", "--out", str(tmp_path))
    torch.manual_seed(0)
    weights = tmp_path / "w.pth"
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), weights)
    export.main([name, str(weights), *options])
    said = capsys.readouterr().out
    assert f"2 x 3 x {size[0]} x {size[1]}" in said and f"3 x 3 x {size[0] + 64} x {size[1] + 64}" in said
    session, x = onnxruntime.InferenceSession(tmp_path / "model.onnx"), torch.randn(1, 3, 128, 96)
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_archive_of_torch(tmp_path, capsys):
    export.main(["vim_t", "--format", "torch", "--size", "64", "64", "--dynamic", "", "--out", str(tmp_path)])
    program = torch.export.load(tmp_path / "model.pt2")
    assert any(node.target is torch.ops.linzoo.selective_scan.default for node in program.graph.nodes)
    assert "0.0e+00" in capsys.readouterr().out


@pytest.mark.slow
def test_integers(tmp_path, capsys):
    """The error is that of --calib's images."""
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((12, 12, 1), np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    options = ("--format", "qdq", "--calib", str(tmp_path), "--out", str(tmp_path / "out"))
    export.main(["test_vit2", *options, "--images", "6"])
    said = capsys.readouterr().out
    error = float(re.search(r"over 6 calibration images: error ([0-9.]+) of their spread, same class", said)[1])
    assert 0 < error < 0.5
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model_int8.onnx"]
    assert "holds 6 images; expected 32" in refused(capsys, "test_vit2", *options)
    assert "'segmamba' takes volumes" in refused(capsys, "segmamba", *options)


def test_a_wrong_file_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.FORMATS, "torch", (lambda *args: lambda x: [torch.zeros(len(x), 1000)], "model.pt2"))
    with pytest.raises(SystemExit) as ended:
        export.main(["test_byobnet", "--format", "torch", "--size", "32", "32", "--out", str(tmp_path)])
    assert ended.value.code == 1 and "is off by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, said",
    [
        (["vssd"], "MODEL 'vssd': no such model in timm or LinZoo (did you mean 'vssd_"),
        (["test_byobnet", "--dynamic", "depth"], "unknown axis 'depth'; expected some of batch,height,width"),
        (["test_byobnet", "--size", "0", "32"], "--size 0 32: expected 2 positive numbers"),
        (["test_vit", "--size", "33", "33"], "MODEL 'test_vit' takes 160 x 160 alone"),
        (["test_byobnet", "absent.pth"], "absent.pth"),
        (["vim2_t.untrained"], "no weights of 'vim2_t.untrained' are published"),
        (["test_byobnet", "--format", "qdq"], "--calib None: expected a folder with --format qdq"),
        (["test_byobnet", "--calib", "."], "--calib .: expected a folder with --format qdq, and with it alone"),
        (["rwkvsam"], "MODEL 'rwkvsam' is of kind 'promptable'; expected one that takes images or volumes alone"),
        (["cls/groupmamba_t_digits"], "is a config: WEIGHTS is missing; expected its checkpoint"),
    ],
)
def test_what_is_refused(tmp_path, capsys, argv, said):
    assert said in refused(capsys, *argv, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_line(capsys):
    """Every command says what it is, in the list and by itself."""
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["completion", "bash"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert cli.main(["finetun"]) == 2
    with pytest.raises(SystemExit, match="0"):
        cli.main(["make-data", "--help"])
    for name in ("export", "finetune", "build"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
