"""What is not installed, or too new, is said in one line or does no harm; importing changes nothing of a user's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env}
    )


@pytest.mark.parametrize("tool", ["train", "test", "predict"])
def test_without_the_extra(tool):
    missing = "import sys; sys.modules['mmpretrain'] = None"
    done = run(f"{missing}\nfrom linzoo.tools.cli import main; sys.exit(main(['{tool}', 'x']))")
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: linzoo {tool}: ") and line.endswith('pip install "linzoo[train]"')


def test_without_diffusers():
    """The benchmark says what to install; the rest of `generate` imports without it."""
    missing = "import sys; sys.modules['diffusers'] = None"
    done = run(f"{missing}\nfrom linzoo.tools.cli import main; main(['benchmark', 'linfusion'])")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("linfusion needs diffusers: pip install 'linzoo[generate]'")
    done = run(f"{missing}\nfrom linzoo.generate.linfusion import install; install(None)")
    assert done.stderr.splitlines()[-1] == "ValueError: unet: expected a UNet of diffusers, got NoneType"


def test_beside_a_new_transformers(tmp_path):
    """mmpretrain asks for names that later versions do not have; all tools work without them, also if it came first."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text('__version__ = "5.24.0"\n')
    (tmp_path / "transformers-5.24.0.dist-info").mkdir()
    (tmp_path / "transformers-5.24.0.dist-info/METADATA").write_text("Name: transformers\nVersion: 5.24.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    tools = "import linzoo.backbones.openmmlab, linzoo.tools.train, linzoo.tools.test, linzoo.tools.predict"
    done = run(f"{tools}; import transformers; print(transformers.__version__)", PYTHONPATH=path)
    assert done.stdout.strip() == "5.24.0", done.stderr[-2000:]
    assert run(f"import mmpretrain.registry; {tools}", PYTHONPATH=path).returncode == 0
    assert run("import mmpretrain.models", PYTHONPATH=path).returncode != 0, "else this test shows nothing"


def test_import_changes_nothing():
    """A user's matplotlib backend and torch's threads and modes are as before."""
    code = """
import json, matplotlib, torch
def state():
    return [matplotlib.rcParams._get_backend_or_none(), torch.get_num_threads(), torch.is_grad_enabled()]
before = state()
import linzoo.tools.predict, linzoo.tools.train, linzoo.tools.test, linzoo.tools.denoise
print(json.dumps([before, state()]))
"""
    before, after = json.loads(run(code).stdout)
    assert before == after and after[0] is None
