"""What every test of the session runs under.

Unwritten memory is filled with NaN (the largest integer for integer dtypes): `torch.empty` and its relatives, in Python
and in C++ kernels that allocate through the dispatcher, so that a kernel that leaves an element unwritten is seen.

Two things that take a tiny training run most of its time are left out: yapf, which lays out the text of a config each
time that mmengine writes it (runs in processes of their own have it), and collecting garbage among what imports made.
"""

import contextlib
import gc
import logging
import os
import subprocess
import sys

import pytest
import torch


def pytest_configure(config):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")
    logging.getLogger("torch.__trace").disabled = True  # thousands of empty lines beside a failure under torch.compile
    if "PYTEST_XDIST_WORKER" in os.environ:  # several workers with several threads each fight for the same cores
        torch.set_num_threads(1)


def pytest_collection_finish(session):
    with contextlib.suppress(ImportError):
        import yapf.yapflib.yapf_api

        yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, False)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def forget():
    """What a file's tests compiled is dropped, and what they leave behind is no garbage to look through again."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    gc.freeze()


ALONE = """
import sys
import torch
from torch._inductor import aoti_load_package

package, given, found = sys.argv[1:]
torch.save(aoti_load_package(package)(torch.load(given)), found)
assert not [name for name in sys.modules if "linzoo" in name]
"""


@pytest.fixture
def run_alone(tmp_path):
    """``run_alone(package, inputs)``: what an AOTInductor package returns in a process that does not import LinZoo."""

    def run(package, inputs):
        given, found = tmp_path / "given.pt", tmp_path / "found.pt"
        torch.save(inputs, given)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        argv = [sys.executable, "-c", ALONE, *map(str, (package, given, found))]
        subprocess.run(argv, cwd=tmp_path, env=env, check=True)
        return torch.load(found)

    return run


@pytest.fixture(autouse=True)
def seed():
    """The same random stream for every test, whatever ran before it; returns the seed."""
    torch.manual_seed(0)
    return 0
