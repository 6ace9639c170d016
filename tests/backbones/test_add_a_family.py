"""A stranger follows CONTRIBUTING: the family that stands there registers and passes the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What the steps of CONTRIBUTING do to `backbones/__init__.py`, for a file of another folder.
PLUGIN = """
import importlib, os
import linzoo.backbones as zoo
zoo.__path__.append(os.environ["FAMILY_FOLDER"])
importlib.import_module("linzoo.backbones.toymamba")
zoo._FAMILIES["backbone"] += ("toymamba",)
zoo._check_registration()
"""


@pytest.mark.slow
def test_family_of_contributing_passes_the_contract(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "register_model" in block]
    assert len(code.splitlines()) < 70
    (tmp_path / "toymamba.py").write_text(code)
    (tmp_path / "toy_plugin.py").write_text(PLUGIN)
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "FAMILY_FOLDER": str(tmp_path)}
    for name in [n for n in env if n.startswith("PYTEST_")]:  # of the session that runs this test
        del env[name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "toy_plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["tests/backbones/test_contract.py", "-k", "toymamba_t"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed > 30 and "failed" not in result.stdout
