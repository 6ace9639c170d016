// Rational function on CUDA. A thread is a channel, a warp 32 of them; the warps of a block share out the rows of a
// split.
//
//   y = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + ... + |b_4||x|^4);  table (10, C): a, then |b|, for every
//   channel

#include "device.cuh"

constexpr int kWarps = kThreads / 32;

// A channel, and the rows of a split that its warp takes.
struct Split {
  i64 channel, first, end, index;
  bool active;
  __device__ __forceinline__ Split(i64 rows, i64 C, i64 split_rows) {
    const i64 blocks = (C + 31) / 32;
    channel = blockIdx.x % blocks * 32 + threadIdx.x % 32;
    index = blockIdx.x / blocks;
    first = index * split_rows + threadIdx.x / 32;
    end = smaller((index + 1) * split_rows, rows);
    active = channel < C;
  }
};

template <class T>
struct Coefficients {
  T a[6], b[4];
  __device__ __forceinline__ Coefficients(const T* table, const Split& p, i64 C) {
#pragma unroll
    for (int i = 0; i < 6; ++i) a[i] = p.active ? table[i * C + p.channel] : T(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = p.active ? table[(6 + i) * C + p.channel] : T(0);
  }
  __device__ __forceinline__ T numerator(T x) const {
    return a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))));
  }
  __device__ __forceinline__ T denominator(T z) const { return T(1) + z * (b[0] + z * (b[1] + z * (b[2] + z * b[3]))); }
};

template <class S, class T>
__global__ void __launch_bounds__(kThreads) forward(const S* x, const T* table, i64 rows, i64 C, i64 split_rows, S* y) {
  const Split p(rows, C, split_rows);
  const Coefficients<T> f(table, p, C);
  if (!p.active) return;
#pragma unroll 4
  for (i64 row = p.first; row < p.end; row += kWarps) {
    const T value = get<T>(x + row * C + p.channel);
    put(y + row * C + p.channel, f.numerator(value) / f.denominator(value < T(0) ? -value : value));
  }
}

// sums (splits, 10, C): the gradients of a and of |b|, for every channel.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy, const S* x, const T* table, i64 rows, i64 C, i64 split_rows, S* dx, T* sums) {
  __shared__ T parts[kWarps][10][32];
  const Split p(rows, C, split_rows);
  const Coefficients<T> f(table, p, C);
  T sum[10] = {};
  if (p.active) {
#pragma unroll 2
    for (i64 row = p.first; row < p.end; row += kWarps) {
      const T value = get<T>(x + row * C + p.channel), sign = value < T(0) ? T(-1) : T(1), z = value * sign;
      const T below = T(1) / f.denominator(z), ratio = f.numerator(value) * below;
      const T above = get<T>(dy + row * C + p.channel) * below;  // dL/d numerator
      const T slope = f.a[1] + value * (2 * f.a[2] + value * (3 * f.a[3] + value * (4 * f.a[4] + value * 5 * f.a[5])));
      const T slope_below = f.b[0] + z * (2 * f.b[1] + z * (3 * f.b[2] + z * 4 * f.b[3]));
      put(dx + row * C + p.channel, above * (slope - ratio * sign * slope_below));
      T power = above;
#pragma unroll
      for (int i = 0; i < 6; ++i, power *= value) sum[i] += power;
      power = -above * ratio;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[6 + i] += power *= z;
    }
  }
#pragma unroll
  for (int i = 0; i < 10; ++i) parts[threadIdx.x / 32][i][threadIdx.x % 32] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x / 32; i < 10 && p.active; i += kWarps) {
    T total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += parts[warp][i][threadIdx.x % 32];
    sums[(p.index * 10 + i) * C + p.channel] = total;
  }
}
