"""The site and README: what they show runs, what they tell to type exists."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import linzoo.backbones  # noqa: F401
from linzoo.tools.cli import COMMANDS, MODULES
from linzoo.tools.configs import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^ *```{language}\b[^\n]*\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)


SLOW = {"export.md": (pytest.mark.slow,)}
RUN = [p for p in PAGES if blocks(p, "python") and p.name != "cluster.md"]  # which has a test of its own


@pytest.mark.parametrize("page", [pytest.param(p, marks=SLOW.get(p.name, ()), id=p.name) for p in RUN])
def test_python_runs(page, tmp_path, monkeypatch):
    """Block after block, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    if page.name == "export.md":
        pytest.importorskip("onnxruntime")
        for form in ("onnx", "aoti"):
            options = ["--format", form, "--size", "224", "224", "--dynamic", "batch", "--out", "out"]
            importlib.import_module("linzoo.tools.export").main(["test_byobnet", *options])
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.slow
def test_two_processes_shard_a_model(tmp_path):
    """They print what the page says, and write weights that timm loads."""
    page = ROOT / "docs" / "cluster.md"
    [script] = blocks(page, "python")
    (tmp_path / "train_fsdp.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train_fsdp.py"]
    for _ in range(3):  # on a busy machine Gloo aborts now and then when processes end
        done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True)
        if done.returncode == 0 or "exitcode: -6" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    losses, said = (
        re.findall(r"^step \d: loss (\d\.\d+)", text, re.MULTILINE) for text in (done.stdout, page.read_text())
    )
    assert len(losses) == 3 and [float(x) for x in losses] == pytest.approx([float(x) for x in said], rel=1e-3)
    sizes = dict(num_classes=10, img_size=32, patch_size=8, depth=2)
    timm.create_model("plain_ss2d_t", checkpoint_path=str(tmp_path / "weights.pth"), **sizes)


def commands() -> list[str]:
    lines = {line for page in [*PAGES, *CARDS] for block in blocks(page, "console") for line in block.splitlines()}
    return sorted(line[2:].partition("  #")[0].strip() for line in lines if line.startswith("$ "))


def help_of(module: str, words: list[str]) -> str:
    """What a tool says of its options."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*(word for word in words[:1] if word[0] != "-"), "--help"])
    return out.getvalue()


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line):
    """Commands, options, configs and models that a reader is told to type."""
    words = shlex.split(line)
    assert words[0] in ("linzoo", "make", "pip", "python", "torchrun"), line
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
        elif re.fullmatch(r"(cls|seg|det|gen|restore|track|interp|vol|sam|occ|video|forecast)/\w+", word):
            assert word in shipped_configs()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "pip":
        return
    script = next((word for word in words if re.fullmatch(r"tools/\w+\.py", word)), None)
    if words[0] == "linzoo":
        assert words[1] in COMMANDS
        module, rest = MODULES.get(words[1], f"linzoo.tools.{words[1]}"), words[2:]
        if words[1] in ("finetune", "export", "look") and not re.search(r"[A-Z:/]", rest[0]):
            assert timm.is_model(rest[0]), rest[0]
    elif script:
        assert (ROOT / script).is_file()
        module, rest = f"linzoo.tools.{Path(script).stem}", words[words.index(script) + 1 :]
    else:
        return
    known = set(re.findall(r"(?<![\w-])--[\w-]+", help_of(module, rest)))
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


def test_shell_scripts_parse():
    for page in PAGES:
        for script in blocks(page, "bash"):
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.slow
def test_site_builds(tmp_path):
    """Without a warning; cards and parts of README are in it, links lead to pages, nothing loads from afar."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tags = re.compile("<[^>]+>")
    pages = {str(path.parent.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("index.html")}
    cards, own = {f"cards/{card.stem}" for card in CARDS}, {page.stem for page in PAGES if page.parent.name == "docs"}
    assert cards | own - {"index"} < set(pages)
    shown = {name: tags.sub("", page) for name, page in pages.items()}
    assert "the families in timm" in shown["."] and "multiply-add" in shown["cards/common"]
    assert 'href="../cards/vmamba/"' in pages["models"] and "selective_scan(u, u" in shown["get_started"]
    assert "Selective scan of" in shown["operators"] and "class ToyMamba" in shown["add_a_family"]
    for name, page in pages.items():
        assert not re.search(
            r'<(?:script|img|iframe)[^>]*src="https?:|<link[^>]*rel="stylesheet"[^>]*href="https?:', page
        )
        assert "{{ " not in page, name
