// The two sums of convolution kernels of state spaces on CUDA. Complex numbers are (re, im).
//
//   vandermonde  K_l = 2 Re sum_n c_n exp(l x_n)
//   cauchy       R_k = sum_n v_n / (2i s_k - c_k w_n) + v_n^* / (2i s_k - c_k w_n^*)
//
// Forward, a thread is kAtOnce steps, or a node, of a feature, and sums over its modes; backward, a warp is a mode, and
// its lanes walk the steps or nodes.

#include "device.cuh"

constexpr int kAtOnce = 16;  // steps from one exponential, by products

template <class T>
struct Complex {
  T re, im;
  __device__ __forceinline__ Complex conj() const { return {re, -im}; }
  __device__ __forceinline__ Complex operator*(Complex o) const {
    return {re * o.re - im * o.im, re * o.im + im * o.re};
  }
  __device__ __forceinline__ Complex operator*(T s) const { return {re * s, im * s}; }
  __device__ __forceinline__ void operator+=(Complex o) { re += o.re, im += o.im; }
};
template <class T>
__device__ __forceinline__ Complex<T> at(const T* p, i64 i) {
  return {p[2 * i], p[2 * i + 1]};
}

// exp(l x): the angle's whole turns are taken off in float64, which costs nothing beside the sine.
template <class T>
__device__ __forceinline__ Complex<T> power(Complex<T> x, i64 l) {
  const double turns = static_cast<double>(l) * x.im * 0.15915494309189535;
  const T angle = T((turns - floor_(turns + 0.5)) * 6.283185307179586), size = exp_(T(l) * x.re);
  return {size * cos_(angle), size * sin_(angle)};
}

// c, x (H, N), k (H, L).
template <class T>
__global__ void __launch_bounds__(kThreads) vandermonde(const T* c, const T* x, i64 H, i64 N, i64 L, T* k) {
  const i64 runs = (L + kAtOnce - 1) / kAtOnce, i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= H * runs) return;
  const i64 h = i / runs, first = i % runs * kAtOnce;
  T sums[kAtOnce] = {};
  for (i64 n = h * N; n < (h + 1) * N; ++n) {
    const Complex<T> mode = at(x, n), step = power(mode, 1);
    Complex<T> z = at(c, n) * power(mode, first);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sums[j] += 2 * z.re;
      z = z * step;
    }
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) {
    if (first + j < L) k[h * L + first + j] = sums[j];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    vandermonde_backward(const T* dk, const T* c, const T* x, i64 H, i64 N, i64 L, T* dc, T* dx) {
  const i64 warp = static_cast<i64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const bool active = warp < H * N;
  const i64 n = active ? warp : 0, h = n / N;
  const int lane = threadIdx.x % 32;
  const Complex<T> mode = at(x, n), step = power(mode, 1);
  T sums[4] = {};  // of dk z, and of dk l z
  for (i64 first = lane * kAtOnce; first < L && active; first += 32 * kAtOnce) {
    Complex<T> z = power(mode, first);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const T g = first + j < L ? dk[h * L + first + j] : T(0), l = T(first + j);
      sums[0] += g * z.re, sums[1] += g * z.im;
      sums[2] += g * l * z.re, sums[3] += g * l * z.im;
      z = z * step;
    }
  }
  const T sum = warp_sums(sums);  // one of the four to every eighth lane
  const T other = __shfl_xor_sync(0xffffffffu, sum, 8);
  if (!active) return;
  if (lane == 0) dc[2 * n] = 2 * sum, dc[2 * n + 1] = -2 * other;
  const Complex<T> s = at(c, n) * Complex<T>{sum, other};
  if (lane == 16) dx[2 * n] = 2 * s.re, dx[2 * n + 1] = -2 * s.im;
}

// 1 / (2i s - c w) at a node (s, c).
template <class T>
__device__ __forceinline__ Complex<T> pole(Complex<T> w, Complex<T> node) {
  const T re = -node.im * w.re, im = 2 * node.re - node.im * w.im, size = T(1) / (re * re + im * im);
  return {re * size, -im * size};
}

// v (H, V, N), w (H, N), nodes (K), r (H, V, re or im, K).
template <class T>
__global__ void __launch_bounds__(kThreads)
    cauchy(const T* v, const T* w, const T* nodes, i64 H, i64 V, i64 N, i64 K, T* r) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= H * V * K) return;
  const i64 k = i % K, hv = i / K, h = hv / V;
  const Complex<T> node = at(nodes, k);
  Complex<T> sum{0, 0};
  for (i64 n = 0; n < N; ++n) {
    const Complex<T> weight = at(v, hv * N + n), mode = at(w, h * N + n);
    sum += weight * pole(mode, node);
    sum += weight.conj() * pole(mode.conj(), node);
  }
  r[hv * 2 * K + k] = sum.re;
  r[(hv * 2 + 1) * K + k] = sum.im;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cauchy_backward(const T* dr, const T* v, const T* w, const T* nodes, i64 H, i64 V, i64 N, i64 K, T* dv, T* dw) {
  const i64 warp = static_cast<i64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const bool active = warp < H * N;
  const i64 n = active ? warp % N : 0, h = active ? warp / N : 0;
  const int lane = threadIdx.x % 32;
  const Complex<T> mode = at(w, h * N + n);
  Complex<T> to_mode{0, 0};
  for (i64 hv = h * V; hv < (h + 1) * V; ++hv) {
    const Complex<T> weight = at(v, hv * N + n);
    Complex<T> to_weight{0, 0};
    for (i64 k = lane; k < K && active; k += 32) {
      const Complex<T> node = at(nodes, k), g{dr[hv * 2 * K + k], dr[(hv * 2 + 1) * K + k]};
      const Complex<T> upper = pole(mode, node), lower = pole(mode.conj(), node);
      to_weight += g * upper.conj();
      to_weight += g.conj() * lower;
      to_mode += g * (weight * upper * upper).conj() * node.im;
      to_mode += g.conj() * weight.conj() * lower * lower * node.im;
    }
    const T parts[2] = {to_weight.re, to_weight.im};
    const T sum = warp_sums(parts);
    if (active && lane % 16 == 0) dv[2 * (hv * N + n) + lane / 16] = sum;
  }
  const T parts[2] = {to_mode.re, to_mode.im};
  const T sum = warp_sums(parts);
  if (active && lane % 16 == 0) dw[2 * (h * N + n) + lane / 16] = sum;
}
