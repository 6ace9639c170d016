// Runs the CUDA kernels on the CPU, to check their values where there is no GPU. The threads of a block are coroutines
// that take turns: each runs until it meets a barrier, a shuffle or a product on tensor cores, then the next one of its
// warp. Every thread of a warp must therefore meet the same, and every warp of a block the same barriers, which is what
// the kernels promise anyway; where one does not, the run aborts. Between two barriers of the block one warp runs after
// the other, and the threads of a warp between two meetings, in an order that changes: a missing barrier shows. Each
// block begins with shared memory that is not a number. Tensor cores take the bits that count of their operands, and
// round their sums towards 0.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kMaxThreads = 1024, kStack = 256 * 1024;
enum {
  kBlock = 1,
  kWarp,
  kShuffle,
  kProduct
};  // what a thread may wait at: barriers, then what its warp does together
static ucontext_t scheduler, threads[kMaxThreads];
static bool finished[kMaxThreads];
static int meeting[kMaxThreads];  // what the thread waits at
static double exchange[2][kMaxThreads];
static float operands[2][kMaxThreads][6];  // of a thread for a tensor core: a, b
static int parity[kMaxThreads], current, turn[kMaxThreads];
static std::vector<std::pair<char*, size_t>> shared_memory;  // whoever loads the library says where it lies

inline void wait_at(int what) {
  meeting[current] = what;
  swapcontext(&threads[current], &scheduler);
}

template <class T>
T shuffle(T x, int source) {
  const int self = current, p = parity[self] ^= 1;
  exchange[p][self] = static_cast<double>(x);
  wait_at(kShuffle);
  return static_cast<T>(exchange[p][source]);
}

inline float towards_zero(double x) {
  const float y = static_cast<float>(x);
  return std::abs(static_cast<double>(y)) > std::abs(x) ? std::nextafterf(y, 0.f) : y;
}

using Call = void (*)(void**);
static Call call;
static void** arguments;

inline void body() {
  call(arguments);
  finished[current] = true;
  swapcontext(&threads[current], &scheduler);
}

inline void shuffle_turns(int* turns, int begin, int end) {
  static unsigned random = 1;
  for (int i = begin; i < end; ++i) turns[i] = i;
  for (int i = end - 1; i > begin; --i) {
    random = random * 1664525u + 1013904223u;
    std::swap(turns[i], turns[begin + (random >> 8) % (i - begin + 1)]);
  }
}

// Lets every thread of a warp run on; returns what they meet, 0 if they have left.
inline int run_warp(int begin, int end) {
  int met = -1;
  shuffle_turns(turn, begin, end);
  for (int k = begin; k < end; ++k) {
    const int i = turn[k];
    current = i;
    threadIdx.x = i;
    meeting[i] = 0;
    if (!finished[i]) swapcontext(&scheduler, &threads[i]);
    if (met >= 0 && met != meeting[i])
      std::fprintf(stderr, "threads of a warp meet different barriers\n"), std::abort();
    met = meeting[i];
  }
  return met;
}

inline void run_block(std::vector<char>& stacks) {
  const int count = blockDim.x, warps = (count + 31) / 32;
  int warp_turn[kMaxThreads / 32];
  for (const auto& [begin, size] : shared_memory) std::memset(begin, 0xff, size);
  for (int i = 0; i < count; ++i) {
    finished[i] = false;
    parity[i] = 0;
    getcontext(&threads[i]);
    threads[i].uc_stack.ss_sp = stacks.data() + static_cast<size_t>(i) * kStack;
    threads[i].uc_stack.ss_size = kStack;
    threads[i].uc_link = nullptr;
    makecontext(&threads[i], body, 0);
  }
  for (int waiting = warps; waiting > 0;) {
    waiting = 0;
    shuffle_turns(warp_turn, 0, warps);
    for (int w = 0; w < warps; ++w) {
      const int begin = warp_turn[w] * 32, end = begin + 32 < count ? begin + 32 : count;
      int met = kWarp;
      while (met >= kWarp) met = run_warp(begin, end);
      waiting += met == kBlock;
    }
    if (waiting && waiting != warps) std::fprintf(stderr, "some warps have left before a barrier\n"), std::abort();
  }
}

template <class... P, std::size_t... I>
void apply(void (*kernel)(P...), void** a, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<P>*>(a[I])...);
}
template <class... P>
void apply(void (*kernel)(P...), void** a) {
  apply(kernel, a, std::index_sequence_for<P...>{});
}

inline void launch(Call c, long long grid, int block, void** a) {
  if (block > kMaxThreads) std::abort();
  std::vector<char> stacks(static_cast<size_t>(block) * kStack);
  call = c;
  arguments = a;
  blockDim = {static_cast<unsigned>(block), 1, 1};
  gridDim = {static_cast<unsigned>(grid), 1, 1};
  for (long long b = 0; b < grid; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    run_block(stacks);
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait_at(emulator::kBlock); }
inline void __syncwarp() { emulator::wait_at(emulator::kWarp); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::shuffle(x, emulator::current ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulator::shuffle(x, emulator::current / 32 * 32 + lane);
}
template <class T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p += x;
  return old;
}

#include "device.cuh"

template <int V, class S>
Pack<S, V> read(const S* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(Pack<S, V>)) std::fprintf(stderr, "misaligned\n"), std::abort();
  return *reinterpret_cast<const Pack<S, V>*>(p);
}
template <class S, class T, int V>
void write(S* p, const T (&x)[V]) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(Pack<S, V>)) std::fprintf(stderr, "misaligned\n"), std::abort();
  *reinterpret_cast<Pack<S, V>*>(p) = packed<S>(x);
}
template <class T, int V>
void add(T* p, const T (&x)[V]) {
  for (int v = 0; v < V; ++v) atomicAdd(p + v, x[v]);
}
template <class S>
S* advance(S* p, int row, unsigned bytes) {
  const auto offset = static_cast<unsigned long long>(static_cast<unsigned>(row)) * bytes;
  return reinterpret_cast<S*>(reinterpret_cast<std::uintptr_t>(p) + offset);
}

inline float as_tf32(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffffe000u;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  using namespace emulator;
  const int self = current, p = parity[self] ^= 1, first = self / 32 * 32, g = self % 32 / 4, q = self % 4;
  for (int i = 0; i < 6; ++i) operands[p][self][i] = as_tf32(i < 4 ? a[i] : b[i - 4]);
  wait_at(kProduct);
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 8; ++k) {
      const float* left = operands[p][first + 4 * g + k % 4];
      const float* right = operands[p][first + 4 * (2 * q + i % 2) + k % 4];
      sum += static_cast<double>(left[k / 4 * 2 + i / 2]) * right[4 + k / 4];
    }
    d[i] = towards_zero(sum);
  }
}

inline float widen(bfloat16 x) {
  const unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void narrow(float x, bfloat16& y) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  y.bits = static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float widen(float16 x) {
  _Float16 y;
  std::memcpy(&y, &x.bits, 2);
  return static_cast<float>(y);
}
inline void narrow(float x, float16& y) {
  const _Float16 rounded = static_cast<_Float16>(x);
  std::memcpy(&y.bits, &rounded, 2);
}
