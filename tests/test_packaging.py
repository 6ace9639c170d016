"""What is in the tree is in the package."""

import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib is in Python 3.11", allow_module_level=True)

import tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ops", "backbones", "configs", "tools")


def test_every_folder_with_code_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == {f"linzoo.{name}": name for name in FOLDERS}
    code = {path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    found = {"linzoo." + ".".join(path.relative_to(ROOT).parts) for path in code}
    assert found == set(setuptools["packages"])


def test_imports_point_one_way():
    """tools -> backbones -> backbones/layers -> ops -> torch, and no family imports another.

    A family's files, `<family>.py` and `<family>_<part>.py`, may import each other.
    """
    allowed = {"ops": (), "backbones": ("linzoo.ops",), "tools": ("linzoo.ops", "linzoo.backbones", "linzoo.tools")}
    for name, targets in allowed.items():
        for path in (ROOT / name).rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            for line in lines:
                if line.startswith(("from linzoo", "import linzoo")):
                    assert line.split()[1].startswith(targets), f"{path}: {line}"
    families = {path.stem for path in (ROOT / "backbones").glob("*.py")} - {"__init__", "published"}
    for family in families:
        text = (ROOT / "backbones" / f"{family}.py").read_text()
        kin = {other for other in families if f"{family}_".startswith(f"{other}_") or other.startswith(f"{family}_")}
        assert not any(f"from .{other} import" in text for other in families - kin), family
