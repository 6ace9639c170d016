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


PRODUCT = """
template <class T>
void product(const T* a, const T* b, T* d) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  const float left[4] = {a[g * 8 + q], a[(g + 8) * 8 + q], a[g * 8 + q + 4], a[(g + 8) * 8 + q + 4]};
  const float right[2] = {b[q * 8 + g], b[(q + 4) * 8 + g]};
  float sum[4] = {1, 1, 1, 1};
  mma_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];
}
"""


def test_emulator_multiplies_like_a_tensor_core(emulated):
    """16 x 8 by 8 x 8, whose fragments lie as PTX says; of each factor the upper 19 bits count."""
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    values = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, d)]
    kernel = emulated(PRODUCT, "product<float>", "emulated-test")
    kernel(1, 32, (ctypes.c_void_p * 3)(*(ctypes.addressof(v) for v in values)))
    a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b))
    torch.testing.assert_close(d.double(), a @ b + 1, rtol=0, atol=1e-6)


def test_emulator_runs_a_block(emulated):
    expected, y = run(emulated, WRITE, BARRIER)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("write", "barrier"), ((WRITE, ""), (f"if (blockIdx.x == 0) {WRITE}", BARRIER)), ids=str)
def test_emulator_shows_what_no_thread_wrote_before(emulated, write, barrier):
    """A missing barrier, and shared memory that another block has left."""
    expected, y = run(emulated, write, barrier)
    assert y.isnan().any() and not torch.equal(y, expected)
