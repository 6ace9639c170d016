// Complex diagonal recurrence on CUDA: h_t = a_t h_{t-1} + b_t. A thread is a state of a batch item and a segment of
// its steps. Where there are several segments, `ends` scans each from zero and multiplies its gains, `carry` joins the
// segments one after the other, and `scan` starts each from the state so found.
//
// Layouts: b, h (B, L, M), gains (M) or (B, L, M), states at segments' boundaries (B, segments, M), all complex as (re,
// im).

#include "device.cuh"

constexpr int kAtOnce = 8;  // steps whose inputs a thread reads at once

template <class T>
struct Complex {
  T re, im;
  template <class S>
  static __device__ __forceinline__ Complex of(const Pack<S, 2>& pack) {
    return {get<T>(pack.x), get<T>(pack.x + 1)};
  }
  template <class S>
  static __device__ __forceinline__ Complex load(const S* p, i64 i) {
    return of(read<2>(p + 2 * i));
  }
  template <class S>
  __device__ __forceinline__ void store(S* p, i64 i) const {
    const T both[2] = {re, im};
    write(p + 2 * i, both);
  }
  __device__ __forceinline__ Complex operator*(Complex o) const {
    return {re * o.re - im * o.im, re * o.im + im * o.re};
  }
  __device__ __forceinline__ Complex operator+(Complex o) const { return {re + o.re, im + o.im}; }
};

// kConstant: one gain per state. The gain of time t is that of t + shift, conjugated if `conjugate`; of a time outside,
// 0.
template <class S, class O, class T, bool kConstant, bool kEnds>
__global__ void __launch_bounds__(kThreads)
    scan(const T* gains, i64 shift, i64 conjugate, const S* b, const T* initial, i64 reverse, i64 B, i64 L, i64 M,
         i64 segments, i64 segment_steps, T* boundary, T* products, O* h_) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= B * segments * M) return;
  const i64 m = i % M, segment = i / M % segments, batch = i / (M * segments);
  const i64 first = segment * segment_steps, end = smaller(first + segment_steps, L);
  Complex<T> h{0, 0}, product{1, 0}, gain{0, 0};
  if (!kEnds && segments > 1) h = Complex<T>::load(boundary, i);
  if (!kEnds && segments == 1 && initial) h = Complex<T>::load(initial, batch * M + m);
  const i64 row = batch * L * 2 * M + 2 * m;
  const Tokens<const S> inputs(b, row, 2 * M);
  const Tokens<const T> own_gains(gains, kConstant ? 0 : row, 2 * M);
  const Tokens<O> outputs(h_, row, 2 * M);
  if (kConstant) gain = Complex<T>::load(gains, m);
  if (kConstant && conjugate) gain.im = -gain.im;
  for (i64 start = first; start < end; start += kAtOnce) {
    Pack<S, 2> steps[kAtOnce];
    Pack<T, 2> own[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int step = static_cast<int>(smaller(start + k, end - 1)),
                t = reverse ? static_cast<int>(L) - 1 - step : step;
      const i64 at = t + shift;
      steps[k] = read<2>(inputs.at(t));
      if (!kConstant && at >= 0 && at < L) own[k] = read<2>(own_gains.at(static_cast<int>(at)));
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (start + k >= end) break;
      const int step = static_cast<int>(start + k), t = reverse ? static_cast<int>(L) - 1 - step : step;
      if (!kConstant) gain = Complex<T>::of(own[k]);
      if (!kConstant && conjugate) gain.im = -gain.im;
      h = gain * h + Complex<T>::of(steps[k]);
      if (kEnds) {
        product = product * gain;
      } else {
        h.store(outputs.at(t), 0);
      }
    }
  }
  if (!kEnds) return;
  h.store(boundary, i);
  product.store(products, i);
}

// `boundary` becomes the state that each segment begins with.
template <class T>
__global__ void __launch_bounds__(kThreads)
    carry(T* boundary, const T* products, const T* initial, i64 B, i64 M, i64 segments) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= B * M) return;
  Complex<T> h{0, 0};
  if (initial) h = Complex<T>::load(initial, i);
  const i64 base = i / M * segments * M + i % M;
  for (i64 first = 0; first < segments; first += kAtOnce) {
    Complex<T> ends[kAtOnce], gains[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const i64 at = base + smaller(first + k, segments - 1) * M;
      ends[k] = Complex<T>::load(boundary, at);
      gains[k] = Complex<T>::load(products, at);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k < segments) h.store(boundary, base + (first + k) * M);
      h = gains[k] * h + ends[k];
    }
  }
}
