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

#ifdef __CUDACC_RTC__
// Two units in the last place, like exp2f, but denormal results are 0.
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The hardware's estimate and a step of Newton's: as exact as a division, for x of normal size.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * (2 - x * y);
}
#else
__device__ __forceinline__ float exp2_(float x) { return exp2f(x); }
__device__ __forceinline__ float reciprocal(float x) { return 1 / x; }
#endif
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ double exp2_(double x) { return exp2(x); }
__device__ __forceinline__ float exp_(float x) { return expf(x); }
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float expm1_(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_(double x) { return expm1(x); }
__device__ __forceinline__ float log1p_(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_(double x) { return log1p(x); }
__device__ __forceinline__ float log2_(float x) { return log2f(x); }
__device__ __forceinline__ double log2_(double x) { return log2(x); }
__device__ __forceinline__ float sin_(float x) { return sinf(x); }
__device__ __forceinline__ double sin_(double x) { return sin(x); }
__device__ __forceinline__ float cos_(float x) { return cosf(x); }
__device__ __forceinline__ double cos_(double x) { return cos(x); }
__device__ __forceinline__ float floor_(float x) { return floorf(x); }
__device__ __forceinline__ double floor_(double x) { return floor(x); }

__device__ __forceinline__ double softplus(double x) { return x > 20 ? x : log1p_(exp_(x)); }
// max(x, 0) + log1p(z), z = exp(-|x|): log1p(z) / z is a polynomial, fitted on [0, 1] to a relative error of 4e-7.
__device__ __forceinline__ float softplus(float x) {
  const float z = exp2_(-1.4426950408889634f * fabsf(x));
  float p = -0.0085392008f;
  p = p * z + 0.0440896079f;
  p = p * z - 0.1076816842f;
  p = p * z + 0.1774524003f;
  p = p * z - 0.2449546158f;
  p = p * z + 0.3327547908f;
  p = p * z - 0.4999740422f;
  p = p * z + 0.9999998212f;
  return p * z + fmaxf(x, 0.f);
}

// 1 - exp(-x), x >= 0.
__device__ __forceinline__ double one_less_exp(double x) { return -expm1_(-x); }
__device__ __forceinline__ float one_less_exp(float x) {
  const float series = x * (1 - x * (1 / 2.f - x * (1 / 6.f - x * (1 / 24.f - x * (1 / 120.f - x * (1 / 720.f))))));
  return x < 0.25f ? series : 1 - exp2_(-1.4426950408889634f * x);
}

template <class T>
__device__ __forceinline__ T sigmoid(T x) {  // of less than -80: of -80, 2e-35
  return reciprocal(T(1) + exp2_(T(-1.4426950408889634) * (x < T(-80) ? T(-80) : x)));
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

// V values that lie side by side, read and written in one access; their address is a multiple of its size, up to 16.
template <class S, int V>
struct alignas(sizeof(S) * V < 16 ? sizeof(S) * V : 16) Pack {
  S x[V];
};
template <class T, int V, class S>
__device__ __forceinline__ void unpack(T (&out)[V], const Pack<S, V>& pack) {
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = get<T>(pack.x + v);
}
template <class S, class T, int V>
__device__ __forceinline__ Pack<S, V> packed(const T (&x)[V]) {
  Pack<S, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) put(pack.x + v, x[v]);
  return pack;
}
template <class T, int V>
__device__ __forceinline__ void load(T (&out)[V], const T* p) {
  unpack(out, *reinterpret_cast<const Pack<T, V>*>(p));
}
template <class T, int V>
__device__ __forceinline__ void store(T* p, const T (&x)[V]) {
  *reinterpret_cast<Pack<T, V>*>(p) = packed<T>(x);
}

// Global memory, by assembly: a compiler moves loads to where their values are used and waits there, and splits
// accesses. (Not `ld.global.nc`, which moves behind barriers, too.) `add` is atomic.
#ifdef __CUDACC_RTC__
template <int V, class S>
__device__ __forceinline__ Pack<S, V> read(const S* p) {
  Pack<S, V> out;
  unsigned* w = reinterpret_cast<unsigned*>(&out);
  if constexpr (sizeof(out) == 16) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
  } else if constexpr (sizeof(out) == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  } else if constexpr (sizeof(out) == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
  } else if constexpr (sizeof(out) == 2) {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(reinterpret_cast<unsigned short&>(out)) : "l"(p));
  } else {
    out = *reinterpret_cast<const Pack<S, V>*>(p);
  }
  return out;
}
template <class S, class T, int V>
__device__ __forceinline__ void write(S* p, const T (&x)[V]) {
  const Pack<S, V> pack = packed<S>(x);
  const unsigned* w = reinterpret_cast<const unsigned*>(&pack);
  if constexpr (sizeof(pack) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  } else if constexpr (sizeof(pack) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(p), "r"(w[0]), "r"(w[1]) : "memory");
  } else if constexpr (sizeof(pack) == 4) {
    asm volatile("st.global.u32 [%0], %1;" : : "l"(p), "r"(w[0]) : "memory");
  } else if constexpr (sizeof(pack) == 2) {
    asm volatile("st.global.u16 [%0], %1;" : : "l"(p), "h"(reinterpret_cast<const unsigned short&>(pack)) : "memory");
  } else {
    *reinterpret_cast<Pack<S, V>*>(p) = pack;
  }
}
template <class T, int V>
__device__ __forceinline__ void add(T* p, const T (&x)[V]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (V == 4 && sizeof(T) == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
    return;
  }
#endif
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (sizeof(T) == 4) {
      asm volatile("red.global.add.f32 [%0], %1;" : : "l"(p + v), "f"(x[v]) : "memory");
    } else {
      atomicAdd(p + v, x[v]);
    }
  }
}
// p + row * bytes, in one instruction.
template <class S>
__device__ __forceinline__ S* advance(S* p, int row, unsigned bytes) {
  S* out;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(out) : "r"(row), "r"(bytes), "l"(p));
  return out;
}
// x, but what is computed of it is not known to be the same as before, and is not kept in registers.
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
#else  // the emulator's
template <int V, class S>
Pack<S, V> read(const S* p);
template <class S, class T, int V>
void write(S* p, const T (&x)[V]);
template <class T, int V>
void add(T* p, const T (&x)[V]);
template <class S>
S* advance(S* p, int row, unsigned bytes);
inline int fresh(int x) { return x; }
#endif

// d += a b on a tensor core, by the 32 lanes of a warp together: a is 16 x 8, b 8 x 8, d 16 x 8. Lane 4 g + q holds
//   a: (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4)    d: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)
//   b: (q, g), (q + 4, g)
// The lowest 13 bits of a and b do not count (tf32). From sm_80 on.
#ifdef __CUDACC_RTC__
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
__device__ __forceinline__ float as_tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
#else
void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]);
float as_tf32(float x);
#endif

// A float as two of tf32's: the difference is exact, and loses its last two bits at most on the tensor core.
template <int K>
struct Halves {
  float high[K], low[K];
  Halves() = default;
  __device__ __forceinline__ explicit Halves(const float (&x)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) high[i] = as_tf32(x[i]), low[i] = x[i] - high[i];
  }
  // A left operand of two right ones, transposed: its rows g, and g + 8.
  __device__ __forceinline__ Halves(const Halves<2>& x, const Halves<2>& y) {
    high[0] = x.high[0], high[1] = y.high[0], high[2] = x.high[1], high[3] = y.high[1];
    low[0] = x.low[0], low[1] = y.low[0], low[2] = x.low[1], low[3] = y.low[1];
  }
  // The reverse: its rows g + 8 i as a right operand.
  __device__ __forceinline__ Halves<2> columns(int i) const {
    Halves<2> b;
    b.high[0] = high[i], b.high[1] = high[i + 2], b.low[0] = low[i], b.low[1] = low[i + 2];
    return b;
  }
};
// d += a b, each product off by at most 2^-19 of itself.
__device__ __forceinline__ void mma(float (&d)[4], const Halves<4>& a, const Halves<2>& b) {
  mma_tf32(d, a.low, b.high);
  mma_tf32(d, a.high, b.low);
  mma_tf32(d, a.high, b.high);
}

template <class S, class T>
__device__ __forceinline__ void write_one(S* p, T x) {
  const T one[1] = {x};
  write(p, one);
}
template <class T>
__device__ __forceinline__ void add_one(T* p, T x) {
  const T one[1] = {x};
  add(p, one);
}

// The rows of a group of a batch item, by token; they lie less than 2^32 bytes apart.
template <class S>
struct Tokens {
  S* data;
  unsigned bytes;
  __device__ __forceinline__ Tokens(S* data, i64 offset, i64 token)
      : data(data + offset), bytes(static_cast<unsigned>(token * sizeof(S))) {}
  __device__ __forceinline__ S* at(int token) const { return advance(data, token, bytes); }
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
    unsigned task = blockIdx.x;  // 32-bit divisions are a tenth of 64-bit ones
    c = static_cast<i64>(task % static_cast<unsigned>(blocks)) * blockDim.x + threadIdx.x;
    index = task /= static_cast<unsigned>(blocks);
    segment = task % static_cast<unsigned>(segments);
    task /= static_cast<unsigned>(segments);
    g = task % static_cast<unsigned>(G);
    b = task / static_cast<unsigned>(G);
    begin = segment * segment_steps;
    end = smaller(begin + segment_steps, steps);
    active = c < C;
  }
};

// Whether it is so for every lane of a warp.
__device__ __forceinline__ bool of_warp(bool x) {
  int all = x;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) all &= __shfl_xor_sync(0xffffffffu, all, offset);
  return all;
}

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
