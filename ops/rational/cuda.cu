// Rational function on CUDA. A thread has V channels, a warp 32 V of them; the warps of a block share out the rows of a
// split.
//
//   y = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + ... + |b_4||x|^4);  table (10, C): a, then |b|, for every
//   channel

#include "device.cuh"

constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;  // that a thread reads at once

// The channels of a thread, and the rows of a split that its warp takes.
template <int V>
struct Split {
  i64 channel, first, end, index;
  bool active;
  __device__ __forceinline__ Split(i64 rows, i64 C, i64 split_rows) {
    const unsigned blocks = static_cast<unsigned>((C + 32 * V - 1) / (32 * V));
    channel = (blockIdx.x % blocks * 32 + threadIdx.x % 32) * V;
    index = blockIdx.x / blocks;
    first = index * split_rows + threadIdx.x / 32;
    end = smaller((index + 1) * split_rows, rows);
    active = channel < C;
  }
};

template <class T>
struct Coefficients {
  T a[6], b[4];
  __device__ __forceinline__ void load(const T* table, i64 channel, i64 C) {
#pragma unroll
    for (int i = 0; i < 6; ++i) a[i] = table[i * C + channel];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = table[(6 + i) * C + channel];
  }
  __device__ __forceinline__ T numerator(T x) const {
    return a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))));
  }
  __device__ __forceinline__ T denominator(T z) const { return T(1) + z * (b[0] + z * (b[1] + z * (b[2] + z * b[3]))); }
};

// The rows of a warp from `row` on; the last one again behind it.
template <int V, class S>
__device__ __forceinline__ void read_rows(Pack<S, V> (&out)[kRows], const S* x, i64 row, i64 end, i64 C) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) out[i] = read<V>(x + smaller(row + i * kWarps, end - 1) * C);
}

template <class S, class T, int V>
__global__ void __launch_bounds__(kThreads) forward(const S* x, const T* table, i64 rows, i64 C, i64 split_rows, S* y) {
  const Split<V> p(rows, C, split_rows);
  if (!p.active) return;
  Coefficients<T> f[V];
#pragma unroll
  for (int v = 0; v < V; ++v) f[v].load(table, p.channel + v, C);
  for (i64 row = p.first; row < p.end; row += kWarps * kRows) {
    Pack<S, V> packs[kRows];
    read_rows(packs, x + p.channel, row, p.end, C);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T values[V];
      unpack(values, packs[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = f[v].numerator(values[v]) * reciprocal(f[v].denominator(values[v] < T(0) ? -values[v] : values[v]));
      }
      if (row + i * kWarps < p.end) write(y + (row + i * kWarps) * C + p.channel, values);
    }
  }
}

// sums (splits, 10, C): the gradients of a and of |b|, for every channel.
template <class S, class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy, const S* x, const T* table, i64 rows, i64 C, i64 split_rows, S* dx, T* sums) {
  __shared__ T parts[kWarps][10][32];
  const Split<V> p(rows, C, split_rows);
  const i64 channel = p.active ? p.channel : 0;
  Coefficients<T> f[V];
#pragma unroll
  for (int v = 0; v < V; ++v) f[v].load(table, channel + v, C);
  T sum[V][10] = {};
  for (i64 row = p.first; row < p.end && p.active; row += kWarps * kRows) {
    Pack<S, V> packs[kRows], gradients[kRows];
    read_rows(packs, x + channel, row, p.end, C);
    read_rows(gradients, dy + channel, row, p.end, C);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i * kWarps >= p.end) break;
      T values[V], out[V];
      unpack(values, packs[i]);
      unpack(out, gradients[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Coefficients<T>& g = f[v];
        const T value = values[v], sign = value < T(0) ? T(-1) : T(1), z = value * sign;
        const T below = reciprocal(g.denominator(z)), ratio = g.numerator(value) * below;
        const T above = out[v] * below;  // dL/d numerator
        const T slope =
            g.a[1] + value * (2 * g.a[2] + value * (3 * g.a[3] + value * (4 * g.a[4] + value * 5 * g.a[5])));
        const T slope_below = g.b[0] + z * (2 * g.b[1] + z * (3 * g.b[2] + z * 4 * g.b[3]));
        out[v] = above * (slope - ratio * sign * slope_below);
        T power = above;
#pragma unroll
        for (int k = 0; k < 6; ++k, power *= value) sum[v][k] += power;
        power = -above * ratio;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[v][6 + k] += power *= z;
      }
      write(dx + (row + i * kWarps) * C + channel, out);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 10; ++i) parts[threadIdx.x / 32][i][threadIdx.x % 32] = sum[v][i];
    __syncthreads();
    for (int i = threadIdx.x / 32; i < 10 && p.active; i += kWarps) {
      T total = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) total += parts[warp][i][threadIdx.x % 32];
      sums[(p.index * 10 + i) * C + channel + v] = total;
    }
  }
}
