"""The emulator of CUDA notices what a GPU would get wrong now and then."""

import ctypes

import pytest
import torch

KERNEL = """
template <class T>
void neighbour(const T* x, T* y) {{
  __shared__ T row[64];
  {write}
  {barrier}
  y[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}}
"""
WRITE, BARRIER = "row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];", "__syncthreads();"


def run(emulated, write, barrier):
    x, y = torch.randn(3, 64), torch.zeros(3, 64)
    kernel = emulated(KERNEL.format(write=write, barrier=barrier), "neighbour<float>", "emulated-test")
    values = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
    kernel(3, 64, (ctypes.c_void_p * 2)(*(ctypes.addressof(v) for v in values)))
    return x.flip(1), y


def test_emulator_runs_a_block(emulated):
    expected, y = run(emulated, WRITE, BARRIER)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("write", "barrier"), ((WRITE, ""), (f"if (blockIdx.x == 0) {WRITE}", BARRIER)), ids=str)
def test_emulator_shows_what_no_thread_wrote_before(emulated, write, barrier):
    """A missing barrier, and shared memory that another block has left."""
    expected, y = run(emulated, write, barrier)
    assert y.isnan().any() and not torch.equal(y, expected)
