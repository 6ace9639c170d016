// What the CUDA kernels share. Compiled by NVRTC without any header, one cubin per template instance; the tests compile
// the same sources with a C++ compiler against tests/ops/emulator.h, which runs a block's threads as coroutines.

#pragma once

typedef long long i64;

constexpr int kThreads = LINZOO_THREADS;  // of a block, at most

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

#ifdef __CUDACC_RTC__
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ void narrow(float x, bfloat16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void narrow(float x, float16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
#endif
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }

// The storage type S of a tensor has float as its type of sums, double for double.
template <class T, class S>
__device__ __forceinline__ T get(const S* p) {
  return T(widen(*p));
}
template <class T, class S>
__device__ __forceinline__ void put(S* p, T x) {
  narrow(x, *p);
}

__device__ __forceinline__ float exp2_(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_(double x) { return exp2(x); }
__device__ __forceinline__ float exp_(float x) { return expf(x); }
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float expm1_(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_(double x) { return expm1(x); }
__device__ __forceinline__ float log1p_(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_(double x) { return log1p(x); }
__device__ __forceinline__ float log2_(float x) { return log2f(x); }
__device__ __forceinline__ double log2_(double x) { return log2(x); }
__device__ __forceinline__ float floor_(float x) { return floorf(x); }
__device__ __forceinline__ double floor_(double x) { return floor(x); }

template <class T>
__device__ __forceinline__ T softplus(T x) {
  return x > T(20) ? x : log1p_(exp_(x));
}

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

// A sum of many terms that keeps the digits of small ones (Kahan).
template <class T>
struct Sum {
  T sum = 0, lost = 0;
  __device__ __forceinline__ void add(T x) {
    const T y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
  }
};

// Rows of channels, (batch, token, group) with any strides; the channels of a row are contiguous.
template <class S>
struct Rows {
  S* data;
  i64 batch, token, group;
  __device__ __forceinline__ S* at(i64 b, i64 l, i64 g) const { return data + b * batch + l * token + g * group; }
};

// Which token a step of a group visits: order (G, steps), or (B, G, steps) with `batch` = G steps; null for the tokens'
// own.
struct Order {
  const int* data;
  i64 batch, steps;
  __device__ __forceinline__ i64 token(i64 b, i64 g, i64 t) const { return data ? data[b * batch + g * steps + t] : t; }
};

// Where a thread works: a channel of a group of a batch item, and one segment of its steps. A block is `blockDim.x`
// channels.
struct Place {
  i64 b, g, c, segment, begin, end, index;  // index: of (b, g, segment)
  bool active;
  __device__ __forceinline__ Place(i64 G, i64 C, i64 steps, i64 blocks, i64 segments, i64 segment_steps) {
    i64 task = blockIdx.x;
    c = task % blocks * blockDim.x + threadIdx.x;
    index = task /= blocks;
    segment = task % segments;
    task /= segments;
    g = task % G;
    b = task / G;
    begin = segment * segment_steps;
    end = smaller(begin + segment_steps, steps);
    active = c < C;
  }
};

// Sums of K values over a warp, K a power of two up to 32: lane i returns the sum of value i K / 32. Halving what each
// lane still carries takes K - 1 exchanges, not 5 K.
template <int K, int kOffset = 16, class T>
__device__ __forceinline__ T warp_sums(const T (&x)[K]) {
  if constexpr (kOffset == 0) {
    return x[0];
  } else if constexpr (K == 1) {
    const T sum[1] = {x[0] + __shfl_xor_sync(0xffffffffu, x[0], kOffset)};
    return warp_sums<1, kOffset / 2>(sum);
  } else {
    const bool upper = threadIdx.x & kOffset;
    T half[K / 2];
#pragma unroll
    for (int i = 0; i < K / 2; ++i) {
      const T sent = upper ? x[i] : x[i + K / 2], stays = upper ? x[i + K / 2] : x[i];
      half[i] = stays + __shfl_xor_sync(0xffffffffu, sent, kOffset);
    }
    return warp_sums<K / 2, kOffset / 2>(half);
  }
}
