"""What is in the tree is in the package."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import linzoo
from linzoo.ops.compile_cpu import LEVELS, levels, sources, wheel_platform

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ops", "backbones", "configs", "generate", "quantization", "tools")
DATA = ("model_cards", "docs")


@pytest.mark.parametrize("name", FOLDERS + DATA)
def test_links_lead_to_the_folders(name):
    """Static tools resolve `linzoo.*` by these; a checkout without links (Windows without developer mode) has files."""
    assert (ROOT / "src" / "linzoo" / name).resolve() == ROOT / name


def test_every_folder_with_code_is_in_the_package():
    setuptools = pytest.importorskip("setuptools")
    packages = set(setuptools.find_namespace_packages(str(ROOT / "src")))
    code = {path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    assert {"linzoo." + ".".join(path.relative_to(ROOT).parts) for path in code} <= packages


@pytest.mark.slow
def test_sdist_and_wheel_are_whole(tmp_path):
    """The wheel that is built from the sdist holds every file of the package's folders, and no other."""
    pytest.importorskip("setuptools")
    tree, made, inside = tmp_path / "tree", tmp_path / "made", tmp_path / "inside"
    without = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "data", "work_dirs", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=without)
    build = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, "build_sdist", made], cwd=tree, check=True, capture_output=True)
    [sdist] = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(inside, filter="data")
    [source] = inside.iterdir()
    assert {"CHANGELOG.md", "constraints.txt", "tests", "benchmarks", "Makefile"} <= {p.name for p in source.iterdir()}
    subprocess.run([sys.executable, "-c", build, "build_wheel", made], cwd=source, check=True, capture_output=True)
    [wheel] = made.glob("*.whl")
    files = {
        f"linzoo/{path.relative_to(tree)}"
        for name in FOLDERS + DATA
        for path in (tree / name).rglob("*")
        if path.is_file() and path.suffix != ".sh"  # for developers
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files | {"linzoo/__init__.py", "linzoo/__main__.py", "linzoo/py.typed"}


@pytest.mark.slow
def test_platform_wheel_needs_no_compiler(tmp_path):
    """Its kernels serve where there is none; where the processor is below their level, one line says so."""
    pytest.importorskip("setuptools")
    tree, made, site = tmp_path / "tree", tmp_path / "made", tmp_path / "site"
    without = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "data", "work_dirs", "build", "dist", "tests")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=without)
    level = [*levels(), LEVELS[-1]][0]
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    script = f"""
        import shutil
        from linzoo.ops.compile_cpu import build, build_ahead, prebuilt_path, sources
        build_ahead("rational", {level!r})
        for op in sources().keys() - {{"rational"}}:  # those that the cache holds already save the test a minute
            shutil.copy(build(op), prebuilt_path(op, {level!r}))
    """
    run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": str(tree / "src")})
    tag = wheel_platform()
    options = {"--build-option": [f"--plat-name={tag}"]}
    run(
        [sys.executable, "-c", f"import setuptools.build_meta as b; b.build_wheel({str(made)!r}, {options!r})"],
        cwd=tree,
    )
    [wheel] = made.glob(f"*-py3-none-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = dict(PATH="", HOME=str(tmp_path), PYTHONPATH=str(site), OMP_NUM_THREADS="1", COLUMNS="200")
    said = run([sys.executable, "-m", "linzoo", "doctor"], env=env, cwd=tmp_path).stdout
    assert f"prebuilt for {level}" in said
    for op in sources():
        assert re.search(rf"^ *{op} +cpu +cpu +ok", said, re.M), said
    if level.startswith("x86"):
        below = run([sys.executable, "-m", "linzoo", "doctor"], env={**env, "ATEN_CPU_CAPABILITY": "default"}).stdout
        assert f"install g++ or set CXX, as this wheel's kernels are for {level} and this processor is not" in below


def test_references_are_reached_by_import():
    """A function named as its package does not hide the package's modules."""
    import linzoo.ops.selective_scan.reference as reference
    from linzoo.ops import ssd

    assert reference.tokens_in_order and ssd.reference.nc_ssd and linzoo.ops.rational.reference.sign


def test_version():
    major, minor, patch = linzoo.__version__.split(".")
    assert major.isdigit() and minor.isdigit() and patch.isdigit()


def test_imports_point_one_way():
    """tools -> backbones -> backbones/layers -> ops -> torch, and no family imports another.

    A family's files, `<family>.py` and `<family>_<part>.py`, may import each other.
    """
    allowed = {"ops": (), "backbones": ("linzoo.ops",)}
    allowed["generate"] = ("linzoo.ops", "linzoo.backbones", "linzoo.generate")
    allowed["quantization"] = ("linzoo.ops", "linzoo.backbones", "linzoo.quantization")
    allowed["tools"] = (*allowed["generate"], "linzoo.quantization", "linzoo.tools")
    for name, targets in allowed.items():
        for path in (ROOT / name).rglob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            for line in lines:
                if line.startswith(("from linzoo", "import linzoo")):
                    assert line.split()[1].startswith(targets), f"{path}: {line}"
    shared = {"__init__", "checkpoints", "model_card", "openmmlab", "openmmlab_ops", "published"}
    families = {path.stem for path in (ROOT / "backbones").glob("*.py")} - shared
    for family in families:
        text = (ROOT / "backbones" / f"{family}.py").read_text()
        kin = {other for other in families if f"{family}_".startswith(f"{other}_") or other.startswith(f"{family}_")}
        assert not any(f"from .{other} import" in text for other in families - kin), family
