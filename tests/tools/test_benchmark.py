"""The benchmark measures what it says; no test asserts how fast anything is."""

import argparse
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models import get_pretrained_cfg

from linzoo.backbones import list_models
from linzoo.ops import onednn, use_backend
from linzoo.tools import benchmark

SMALL = {"B": 1, "L": 64, "G": 4, "D": 32, "N": 2}


@pytest.fixture
def small_ops(monkeypatch):
    monkeypatch.setitem(benchmark.OPS, "selective_scan", (benchmark.selective_scan_case, [SMALL]))


def test_calls_are_timed_in_turns():
    log = []
    times = benchmark.medians({name: lambda n=name: log.append(n) for name in "ab"}, "cpu", budget=0.0, least=3)
    assert log == ["a", "a", "b", "b"] + ["a", "b"] * 3  # the first two of each warm it up
    assert times.keys() == {"a", "b"}


def test_a_slow_call_drops_out_once_its_budget_is_spent(monkeypatch):
    seconds = {"slow": 1.0, "fast": 0.125}
    monkeypatch.setattr(benchmark, "seconds", lambda call, device: seconds[call()])
    log = []
    calls = {name: lambda n=name: log.append(n) or n for name in seconds}
    assert benchmark.medians(calls, "cpu", budget=4.0, least=1) == seconds
    assert log.count("slow") == 4
    assert log.count("fast") == 32


def test_exponent_of_a_power_law():
    tokens = [196, 784, 3136]
    assert benchmark.exponent(tokens, [3 * t**1.1 for t in tokens]) == pytest.approx(1.1)


def test_selective_scan_case_is_model_like():
    """Every leaf receives a gradient, the groups share their input, and the floor counts each state of each step."""
    call, leaves, floor = benchmark.selective_scan_case("cpu", **SMALL)
    y = call()
    assert y.shape == (1, 64, 32)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    assert floor().numel() == 64 * 4 * 32 * 2
    with use_backend("reference"):
        torch.testing.assert_close(call(), y, rtol=1e-4, atol=1e-5)


def test_ops_part(small_ops, tmp_path, capsys):
    file = tmp_path / "new" / "ops.json"
    benchmark.main(["ops", "--op", "selective_scan", "--budget", "0", "--json", str(file)])
    (written,) = json.loads(file.read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["threads"] == torch.get_num_threads()
    (row,) = written["rows"]
    assert row["shape"] == SMALL
    assert 0 <= row["error"] < 1e-4
    assert all(row[f"{k}_ms"] > 0 for k in ("floor", "forward", "both", "reference_forward", "reference_both"))
    out = capsys.readouterr().out
    assert "B1 L64 G4 D32 N2" in out
    assert torch.__version__ in out


def test_time_against_length(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(benchmark.OPS, "wkv6", (benchmark.OPS["wkv6"][0], [{"B": 1, "L": 8, "C": 8, "N": 4}]))
    monkeypatch.setitem(benchmark.LENGTHS, "wkv6", (8, 64))
    file = tmp_path / "ops.json"
    benchmark.main(["ops", "--op", "wkv6", "--budget", "0", "--json", str(file)])
    tables = json.loads(file.read_text())
    assert [t["title"] for t in tables] == ["wkv6: cpu backend against the reference", "wkv6: time against length"]
    short, long = tables[1]["rows"]
    assert (short["shape"]["L"], long["shape"]["L"]) == (8, 64)
    for key in ("forward", "both"):
        times = [short[f"{key}_ms"], long[f"{key}_ms"]]
        assert min(times) > 0
        assert long[f"{key}_exponent"] == pytest.approx(benchmark.exponent([8, 64], times))
    assert "time against length" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("bi_wkv", "wkv6", "wkv7"))
def test_wkv_cases_are_complete(name):
    """Every leaf receives a gradient, and the reference gives the same."""
    case, (shape, *_) = benchmark.OPS[name]
    call, leaves, floor = case("cpu", **{**shape, "L": 16})
    y = call()
    grads = torch.autograd.grad(y.square().sum(), leaves)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    floor()
    with use_backend("reference"):
        torch.testing.assert_close(call(), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(benchmark.CUDA_OPS.keys() - {"ssm_kernel"}))
def test_cuda_row(name):
    """What a table of `ops --device cuda` holds, run on the CPU: every shape's keys fit its case."""
    case, shapes = benchmark.CUDA_OPS[name]
    sizes = {"B": 1, "L": 16, "G": 2, "H": 4, "W": 4, "C": 16, "D": 16, "K": 8, "P": 8, "N": 8}
    shape = {k: sizes.get(k, v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in shapes[0].items()}
    rivals = benchmark.RIVALS.get(name, lambda device, **shape: {})
    row = benchmark.cuda_op_row(case, rivals, shape, "cpu", 0)
    assert row["error"] < 1e-3 and row["gb_s"] == pytest.approx(row["bytes"] / row["forward_ms"] / 1e6)
    columns = benchmark.CUDA_COLUMNS | benchmark.rival_columns([row])
    cells = {heading: cell(row) for heading, cell in columns.items()}
    assert ("composition / ours, both" in cells) == (name == "selective_scan")
    assert cells["peak MiB"] == "-" and cells["of a copy"].endswith("%")


def test_composition_of_copies_and_scans_is_the_same_map():
    results = []
    for composed in (False, True):
        torch.manual_seed(0)
        call, leaves, _ = benchmark.cross_scan("cpu", **SMALL, composed=composed)
        y = call()
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiled_models_stand_beside_eager_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    file = tmp_path / "models.json"
    command = ["models", "--models", "test_mambaout", "--size", "32", "--batch", "1", "--budget", "0", "--compile"]
    benchmark.main([*command, "--json", str(file)])
    rows = json.loads(file.read_text())[0]["rows"]
    assert [r["model"] for r in rows] == ["test_mambaout", "test_mambaout (compiled)"]
    assert rows[0]["params"] == rows[1]["params"]


def test_models_by_onednn_stand_beside_those_by_pytorch(tmp_path, capsys):
    file = tmp_path / "models.json"
    command = ["models", "--models", "test_mambaout", "--size", "32", "--batch", "1", "--budget", "0", "--onednn"]
    benchmark.main([*command, "--json", str(file)])
    ours, by_onednn = json.loads(file.read_text())[0]["rows"]
    assert by_onednn["model"] == "test_mambaout (onednn)"
    assert by_onednn["of_eager"] == pytest.approx(ours["seconds"] / by_onednn["seconds"])
    capsys.readouterr()
    benchmark.main(["tables", str(file)])
    assert "| images/s, 1 x 32 px | by oneDNN, 1 x 32 px |" in capsys.readouterr().out
    assert not onednn.is_used()


def test_training_with_activation_checkpointing(tmp_path, capsys):
    file = tmp_path / "models.json"
    command = [
        "models",
        "--models",
        "plain_ss2d_t",
        "--size",
        "224",
        "--batch",
        "1",
        "--budget",
        "0",
        "--checkpointing",
    ]
    with pytest.raises(SystemExit):
        benchmark.main(command)
    assert "--checkpointing: expected with --train" in capsys.readouterr().err
    benchmark.main([*command, "--train", "--json", str(file)])
    kept, anew = json.loads(file.read_text())[0]["rows"]
    assert anew["model"] == "plain_ss2d_t (checkpointed)" and anew["peak_bytes"] < kept["peak_bytes"]
    capsys.readouterr()
    benchmark.main(["tables", str(file)])
    assert "| checkpointed images/s, 1 x 224 px | checkpointed peak MiB, 1 x 224 px |" in capsys.readouterr().out


def test_page_faults_and_allocator(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert "MALLOC_ARENA_MAX=2" in benchmark.allocator()
    few, many = (benchmark.page_faults(lambda n=n: torch.zeros(n, dtype=torch.int8)) for n in (1, 2**30))
    assert few < many and many > 100  # pages have 4 KiB, or up to 2 MiB


def test_operator_share():
    call, _, _ = benchmark.selective_scan_case("cpu", **SMALL)
    x = torch.randn(8, 8)

    def mixed():
        for _ in range(20):
            x @ x
        call()

    assert benchmark.operator_share(lambda: x @ x, "cpu") == 0
    assert 0 < benchmark.operator_share(mixed, "cpu") < 1


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "train"])
def test_models_part(train, tmp_path, capsys):
    name, file = list_models()[0], tmp_path / "models.json"
    command = ["models", "--models", name, "test_mambaout", "--sizes", "32", "64", "--batch", "2", "--budget", "0"]
    picture = tmp_path / "made" / "models.png"
    benchmark.main([*command, "--json", str(file), "--picture", str(picture), *["--train"] * train])
    assert min(Image.open(picture).size) > 300
    (written,) = json.loads(file.read_text())
    assert written["environment"]["pass"] == ("train" if train else "inference")
    rows = {(r["model"], r["size"]): r for r in written["rows"]}
    assert rows.keys() == {(n, s) for n in (name, "test_mambaout") for s in (32, 64)}
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(2 / row["seconds"])
    assert rows[name, 64]["tokens"] == 4 * rows[name, 32]["tokens"]
    assert rows[name, 64]["macs"] > rows[name, 32]["macs"]
    assert rows[name, 64]["exponent"] == rows[name, 32]["exponent"]
    assert 0 < rows[name, 64]["operator_share"] < 1
    assert rows["test_mambaout", 64]["operator_share"] == 0
    assert rows[name, 64]["peak_bytes"] > rows[name, 32]["peak_bytes"] > 0
    assert name in capsys.readouterr().out


def test_speed_beside_swin_tiny(monkeypatch):
    """Of the same run, by images and MACs; none where it did not run."""
    monkeypatch.setattr(benchmark, "medians", lambda calls, *_: dict(zip(calls, (0.5, 0.25), strict=True)))
    monkeypatch.setattr(benchmark, "measure", lambda name, size: (1, 8 if "swin" in name else 2))
    options = dict(batch=1, device="cpu", dtype="float32", budget=0)
    args = argparse.Namespace(**options, train=False, checkpointing=False, compile=False, onednn=False)
    names = [benchmark.SWIN_TINY, "test_mambaout"]
    assert [r["of_swin_tiny"] for r in benchmark.model_rows(names, 32, args)] == [1, 0.5]
    assert [r["of_swin_tiny"] for r in benchmark.model_rows(["test_mambaout", "test_vit"], 32, args)] == [None] * 2


def test_busy_machine_and_unsteady_repeats_are_said(monkeypatch, capsys):
    clock = iter([1, 1, 1.0, 1.2, 1.0, 1, 1, 2.0, 2.01, 2.0])
    monkeypatch.setattr(benchmark, "seconds", lambda call, device: next(clock))
    benchmark.medians({("forward", 64): None}, "cpu", budget=0, least=3)
    benchmark.medians({"steady": None}, "cpu", budget=0, least=3)
    assert capsys.readouterr().err == "warning: repeats differ by more than 10 %: forward 64\n"
    monkeypatch.setattr(benchmark, "run_models", lambda args: None)
    for load, said in ((torch.get_num_threads() + 0.5, "the machine is busy"), (0.0, "")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        benchmark.main(["models", "--models", "test_mambaout"])
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


def test_family_stands_beside_the_baselines(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(benchmark, "model_rows", lambda names, size, args: asked.append(names) or [])
    family = benchmark.family_of(list_models()[0])
    benchmark.main(["models", "--family", family])
    (names,) = asked
    count = len(benchmark.BASELINES)
    assert tuple(names[-count:]) == benchmark.BASELINES
    assert names[:-count] == [n for n in list_models() if benchmark.family_of(n) == family]
    assert all(get_pretrained_cfg(n) for n in names)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("models", "--models or --family"),
        ("models --models no_such_model", "no_such_model"),
        ("models --family no_such_family", "no_such_family"),
        ("models --models test_mambaout --batch 0", "must be positive"),
        ("models --models test_mambaout --picture x.png", "'x.png': expected two --sizes"),
        ("ops --op no_such_op", "no_such_op"),
    ],
)
def test_bad_input(command, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(command.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_json_gathers_tables_and_spares_other_files(small_ops, tmp_path, capsys):
    file = tmp_path / "all.json"
    for command in ("ops --op selective_scan", "models --models test_mambaout --size 32 --batch 1"):
        benchmark.main([*command.split(), "--budget", "0", "--json", str(file)])
    titles = [table["title"] for table in json.loads(file.read_text())]
    assert titles == ["selective_scan: cpu backend against the reference", "models"]
    assert list(tmp_path.iterdir()) == [file]
    for content in ("not JSON", "{}", "[1]"):
        file.write_text(content)
        with pytest.raises(SystemExit):
            benchmark.main(["ops", "--op", "selective_scan", "--json", str(file)])
        assert f"--json: cannot add to '{file}'" in capsys.readouterr().err
        assert file.read_text() == content


def test_cuda_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["ops", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_linfusion_part(tmp_path, capsys):
    pytest.importorskip("diffusers")
    file = tmp_path / "linfusion.json"
    sizes = ["--tokens", "64", "256", "--dim", "32", "--heads", "4"]
    benchmark.main(["linfusion", *sizes, "--budget", "0", "--json", str(file)])
    (written,) = json.loads(file.read_text())
    assert [row["tokens"] for row in written["rows"]] == [64, 256]
    for row in written["rows"]:
        assert row["scores_bytes"] > 4 * 4 * row["tokens"] ** 2  # scores of four heads in float32
        assert 0 < row["linear_bytes"] < row["scores_bytes"]
        assert row["linear_ms"] > 0 and row["softmax_ms"] > 0
    for wrong in (["--tokens", "64", "64"], ["--dim", "30", "--heads", "4"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            benchmark.main(["linfusion", *wrong])
        assert "expected two numbers of --tokens" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_exports(tmp_path, capsys):
    """The widest choice of axes that is right: all of a convolutional network, the batch of a ViT of one size."""
    pytest.importorskip("onnxruntime")
    file = tmp_path / "exports.json"
    command = ["exports", "--models", "test_byobnet", "test_vit", "--budget", "0", "--json", str(file)]
    benchmark.main(command)
    said = capsys.readouterr().out
    [table] = benchmark.tables_of(file)
    found = {(row["model"], row["format"]): row for row in table["rows"]}
    for (model, form), row in found.items():
        assert row["axes"] == ("batch" if model == "test_vit" else "batch,height,width"), (model, form)
        assert row["error"] < 1e-3 and row["other_error"] < 1e-3 and row["file_ms"] > 0
        assert model in said
    assert len(found) == 4


def test_exports_that_fail(monkeypatch, capsys):
    """A row says what stood in the way; the others go on."""
    monkeypatch.setattr(benchmark.export, "FORMATS", {"torch": (lambda *args: [][0], "model.pt2")})
    benchmark.main(["exports", "--models", "test_byobnet", "--formats", "torch", "--budget", "0"])
    said = capsys.readouterr()
    assert "IndexError" in said.out and "test_byobnet, torch, batch: IndexError" in said.err


def test_readme_shows_what_runs_wrote(capsys):
    """Every row of README's tables of times is in the file that it names, as `tables` prints it."""
    root = Path(__file__).parents[2]
    benchmark.main(["tables", str(root / "benchmarks/cpu-2026-11-28.json")])
    printed = set(capsys.readouterr().out.splitlines())
    speed = (root / "README.md").read_text().partition("## Speed")[2].partition("\n## ")[0]
    shown = [line for line in speed.splitlines() if line.startswith("| `")]
    assert len(shown) > 50 and printed.issuperset(shown)


def test_tables_of_no_file(capsys, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path / "x.json", "holds no tables")):
        with pytest.raises(SystemExit):
            benchmark.main(["tables", str(path)])
        assert re.search(f"file: cannot read .*{why}", capsys.readouterr().err)
