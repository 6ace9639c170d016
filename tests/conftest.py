"""What every test of the session runs under.

Unwritten memory is filled with NaN (the largest integer for integer dtypes): `torch.empty` and its relatives, in Python
and in C++ kernels that allocate through the dispatcher, so that a kernel that leaves an element unwritten is seen.
"""

import logging
import os

import pytest
import torch


def pytest_configure(config):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")
    logging.getLogger("torch.__trace").disabled = True  # thousands of empty lines beside a failure under torch.compile
    if "PYTEST_XDIST_WORKER" in os.environ:  # several workers with several threads each fight for the same cores
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random stream for every test, whatever ran before it; returns the seed."""
    torch.manual_seed(0)
    return 0
