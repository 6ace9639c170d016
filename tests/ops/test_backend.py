"""Choosing a backend, and compiling the CPU kernels: what a stranger's machine may lack."""

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from linzoo.ops import backend_info, compile_cpu, compile_cuda, kernel_cache, selective_scan, use_backend
from linzoo.ops.backend import resolve

CPU = torch.device("cpu")

# The operator whose kernel compiles fastest stands for all.
SCAN = """
import torch
from linzoo.ops import diagonal_scan
assert diagonal_scan(torch.ones(3, 2), torch.ones(1, 4, 3, 2)).isfinite().all()
"""


def run(code, **env):
    """Runs `code` in a fresh Python with `env` over ours; returns the finished process."""
    process = start(code, **env)
    process.stdout, process.stderr = process.communicate(timeout=300)
    return process


def start(code, **env):
    command = [sys.executable, "-W", "always", "-c", textwrap.dedent(code)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


def test_device_chooses():
    assert resolve("selective_scan", CPU) == "cpu"
    with use_backend("reference"):
        assert resolve("selective_scan", CPU) == "reference"
        with use_backend(None):
            assert resolve("selective_scan", CPU) == "cpu"
    assert resolve("selective_scan", CPU) == "cpu"


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert resolve("selective_scan", CPU) == "cpu"


def test_unknown_backend():
    message = "name: expected one of cpu, cuda, reference, export, export_chunked, aoti, got 'gpu'"
    with pytest.raises(ValueError, match=message), use_backend("gpu"):
        pass


def test_forced_backend_of_another_device():
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced, but selective_scan .* cpu"):
        resolve("selective_scan", CPU)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced"):
        resolve("selective_scan", torch.device("cuda"))


def test_device_without_a_kernel(monkeypatch):
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference: selective_scan has no kernel for xpu"):
        assert resolve("selective_scan", torch.device("xpu")) == "reference"
    monkeypatch.setenv("LINZOO_STRICT", "1")
    with pytest.raises(RuntimeError, match="LINZOO_STRICT=1 .* no kernel for xpu"):
        resolve("selective_scan", torch.device("xpu"))


def test_backend_info():
    info = backend_info()
    assert info["selective_scan"]["cpu"] is None and info["selective_scan"]["reference"] is None
    assert "ssd has no CUDA kernel" in compile_cuda.unavailable("ssd")
    reason = info["selective_scan"]["cuda"]
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core"):
        assert reason is None
    else:
        assert "linzoo[cuda]" in reason or "cuda-core" in reason


def test_environment_forces_a_backend():
    code = SCAN + "from linzoo.ops.backend import resolve; print(resolve('diagonal_scan', torch.device('cpu')))"
    assert run(code, LINZOO_BACKEND="reference").stdout.strip() == "reference"
    bad = run("import linzoo.ops", LINZOO_BACKEND="fast")
    assert bad.returncode and "LINZOO_BACKEND: expected one of" in bad.stderr and "'fast'" in bad.stderr


@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path):
    """Both get a whole library, and nothing but it, its lock and its hash is left."""
    processes = [start(SCAN, LINZOO_CACHE=str(tmp_path), LINZOO_STRICT="1") for _ in range(2)]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".so", ".lock", ".sha256"]


@pytest.mark.slow
def test_no_compiler(tmp_path):
    """Without a compiler and an empty cache the reference serves, and says so once, with the remedy."""
    empty = tmp_path / "bin"
    empty.mkdir()
    env = dict(PATH=str(empty), CXX="", LINZOO_CACHE=str(tmp_path / "cache"))
    result = run(SCAN + SCAN, **env)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no C++ compiler found") == 1 and "install g++ or set CXX" in result.stderr
    strict = run(SCAN, **env, LINZOO_STRICT="1")
    assert strict.returncode and "LINZOO_STRICT=1 forbids the slow reference" in strict.stderr
    forced = run(SCAN, **env, LINZOO_BACKEND="cpu")
    assert forced.returncode and "'cpu' is forced, but cannot serve diagonal_scan: no C++ compiler" in forced.stderr


@pytest.mark.slow
def test_compiler_that_fails(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = run(SCAN, CXX=str(compiler), LINZOO_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0 and "out of luck" in result.stderr
    assert not list((tmp_path / "cache").glob("*.so")) and not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.slow
def test_unwritable_cache_directory(tmp_path):
    """A file where the directory should be: nobody can write there, root included."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run(SCAN, LINZOO_CACHE=str(blocked), LINZOO_STRICT="1")
    assert result.returncode == 0, result.stderr
    assert f"LINZOO_CACHE: cannot use {blocked}" in result.stderr


@pytest.mark.slow
def test_damaged_library_is_built_anew(tmp_path):
    """One cut short would kill the process with SIGBUS; one that is whole but no library does not load."""
    assert run(SCAN, LINZOO_CACHE=str(tmp_path)).returncode == 0
    [library] = tmp_path.glob("diagonal_scan-cpu-*.so")
    code, digest = library.read_bytes(), library.with_name(f"{library.name}.sha256")
    text = b"no library"
    for contents, recorded, said in (
        (code[:30000], None, "is damaged; it is made anew"),
        (b"", None, "is damaged; it is made anew"),
        (text, hashlib.sha256(text).hexdigest(), "serves, since"),
    ):
        library.unlink()
        library.write_bytes(contents)
        if recorded:
            digest.write_text(recorded)
        result = run(SCAN, LINZOO_CACHE=str(tmp_path), LINZOO_STRICT="1")
        assert result.returncode == 0 and said in result.stderr, result.stderr
        assert library.read_bytes()[:4] == code[:4] and len(library.read_bytes()) == len(code)
        assert run(SCAN, LINZOO_CACHE=str(tmp_path), LINZOO_STRICT="1").stderr == ""


@pytest.mark.slow
def test_lock_that_cannot_be_taken(tmp_path):
    """As another user's: a temporary folder serves, and the cause is said."""
    (tmp_path / f"{compile_cpu.library_name('diagonal_scan')}.lock").mkdir()
    result = run(SCAN, LINZOO_CACHE=str(tmp_path), LINZOO_STRICT="1")
    assert result.returncode == 0 and "Is a directory" in result.stderr and "LINZOO_CACHE: cannot use" in result.stderr
    assert not list(tmp_path.glob("*.so"))


def test_failed_write_leaves_nothing(tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), pytest.warns(RuntimeWarning, match="No space left on device"):
        kernel_cache.stored("kernel.so", full, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.so.lock"]


@pytest.mark.slow
def test_build_command(tmp_path):
    command = [sys.executable, "-m", "linzoo.ops.compile_cpu"]
    env = {**os.environ, "LINZOO_CACHE": str(tmp_path)}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {line.split(":")[0] for line in result.stdout.splitlines()} == set(compile_cpu.sources())
    result = subprocess.run(command, env={**env, "CXX": "no-such-compiler"}, capture_output=True, text=True)
    assert result.returncode == 1 and "looked for no-such-compiler" in result.stderr


def test_key_changes_with_compiler_and_flags(monkeypatch):
    path = compile_cpu.library_name("selective_scan")
    assert path == compile_cpu.library_name("selective_scan")
    monkeypatch.setattr(compile_cpu, "FLAGS", [*compile_cpu.FLAGS, "-g"])
    assert path != compile_cpu.library_name("selective_scan")


def test_kernel_matches_reference_here():
    x = torch.rand(1, 9, 2, 5)
    A, B = -torch.rand(2, 5, 1), torch.rand(1, 9, 2, 1)
    results = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            results.append(selective_scan(x, x, A, B, B))
    torch.testing.assert_close(*results)
