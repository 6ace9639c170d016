"""`linzoo doctor` and the `linzoo` command."""

import subprocess
import sys

import pytest
import torch

import linzoo
from linzoo.ops import self_check as module
from linzoo.ops.onednn import use_onednn
from linzoo.ops.self_check import self_check
from linzoo.tools import cli, doctor
from linzoo.tools.engine import InputError
from linzoo.tools.engine.config import load_config


def test_doctor_tells_versions_backends_and_health(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "torch 2." in out and "kernel cache" in out
    row = next(line for line in out.splitlines() if "selective_scan" in line and " cpu " in line)
    assert row.split()[2] == "cpu" and "ok" in row


def test_doctor_compares_matrix_products(monkeypatch):
    monkeypatch.setattr(doctor, "gflops", iter((100, 210, 100, 110, 205, 90)).__next__)
    assert doctor.matrix_products() == "100 GFLOP/s, by oneDNN 210; LINZOO_MATMUL=onednn is 2.1 times as fast"
    assert doctor.matrix_products() == "100 GFLOP/s, by oneDNN 110"
    with use_onednn():
        assert doctor.matrix_products() == "205 GFLOP/s by oneDNN (LINZOO_MATMUL)"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert doctor.matrix_products() == "90 GFLOP/s"


def test_doctor_says_why_the_reference_serves(tmp_path):
    code = "from linzoo.tools.doctor import main; raise SystemExit(main([]))"
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "LINZOO_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "reference" in result.stdout and "no C++ compiler found" in result.stdout


def test_doctor_fails_on_a_wrong_kernel(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_check", lambda op, device: 0.5)
    assert doctor.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_self_check_sees_nan(monkeypatch):
    assert self_check("selective_scan") < 1e-5
    monkeypatch.setitem(
        module.EXAMPLES, "selective_scan", lambda normal: (lambda x: x * float("nan"), {"x": normal(3)})
    )
    assert self_check("selective_scan") == float("inf")
    with pytest.raises(ValueError, match="op: expected one of .*'scan'"):
        self_check("scan")


def test_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert cli.main(["docter"]) == 2
    assert "unknown command 'docter'" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--no-such-option"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"linzoo {linzoo.__version__}\n"


def test_shipped_configs(capsys, tmp_path, monkeypatch):
    """Listed by pattern, found by name from any folder; a wrong name gets the nearest one."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "det/*vmamba_t*"]) == 0
    names = capsys.readouterr().out.split()
    assert "det/mask-rcnn_vmamba_t_1x_coco" in names and all("vmamba_t" in name for name in names)
    assert cli.main(["configs", "no_such"]) == 1
    assert "no shipped config matches 'no_such'" in capsys.readouterr().err
    for name in ("cls/groupmamba_t_digits", "groupmamba_t_digits", "configs/cls/groupmamba_t_digits.py"):
        assert load_config(name).model.model_name == "groupmamba_t"
    with pytest.raises(InputError, match="did you mean 'cls/groupmamba_t_digits'"):
        load_config("cls/groupmamba_digits")
