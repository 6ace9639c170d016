// Causal depthwise convolution along a scan order on CUDA. A thread is a channel of a group of a batch item and a
// segment of its steps, which it walks with the last K inputs in registers.
//
//   y_t = act(bias + sum_k weight_k x_{t - K + 1 + k}),  x before the first step is 0

#include "device.cuh"

// The last K values of a sequence; the newest is the last.
template <class T, int K>
struct Window {
  T values[K] = {};
  __device__ __forceinline__ void push(T x) {
#pragma unroll
    for (int k = 0; k + 1 < K; ++k) values[k] = values[k + 1];
    values[K - 1] = x;
  }
  __device__ __forceinline__ T dot(const T (&weight)[K]) const {
    T sum = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) sum += weight[k] * values[k];
    return sum;
  }
};

template <class S, class T, int K, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    forward(const S* x_, i64 x_batch, i64 x_token, i64 x_group, const T* weights, const T* biases, const int* order_,
            i64 order_batch, i64 L, i64 G, i64 C, i64 blocks, i64 segments, i64 segment_steps, S* y) {
  const Place p(G, C, L, blocks, segments, segment_steps);
  if (!p.active) return;
  const Order order{order_, order_batch, L};
  const Rows<const S> x{x_, x_batch, x_token, x_group};
  T weight[K];
#pragma unroll
  for (int k = 0; k < K; ++k) weight[k] = weights[(p.g * C + p.c) * K + k];
  const T bias = biases ? biases[p.g * C + p.c] : T(0);
  Window<T, K> window;
#pragma unroll 8
  for (i64 t = larger<i64>(p.begin - K + 1, 0); t < p.end; ++t) {
    const i64 l = order.token(p.b, p.g, t);
    window.push(get<T>(x.at(p.b, l, p.g) + p.c));
    if (t < p.begin) continue;
    const T sum = bias + window.dot(weight);
    put(y + ((p.b * L + l) * G + p.g) * C + p.c, kSilu ? sum / (T(1) + exp_(-sum)) : sum);
  }
}

// dweight (B, segments, G, C, K) and dbias (B, segments, G, C) are sums over the steps of a segment. The gradient of
// x_t needs the K - 1 outputs behind it: the walk goes on so far beyond the segment.
template <class S, class T, int K, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy, const S* x_, i64 x_batch, i64 x_token, i64 x_group, const T* weights, const T* biases,
             const int* order_, i64 order_batch, i64 L, i64 G, i64 C, i64 blocks, i64 segments, i64 segment_steps,
             S* dx, T* dweight, T* dbias) {
  const Place p(G, C, L, blocks, segments, segment_steps);
  if (!p.active) return;
  const Order order{order_, order_batch, L};
  const Rows<const S> x{x_, x_batch, x_token, x_group};
  T weight[K], reversed[K], sums[K] = {}, sum_bias = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) weight[k] = reversed[K - 1 - k] = weights[(p.g * C + p.c) * K + k];
  const T bias = biases ? biases[p.g * C + p.c] : T(0);
  Window<T, K> inputs, slopes;
  for (i64 t = larger<i64>(p.begin - K + 1, 0); t < p.end + K - 1; ++t) {
    T slope = 0;
    if (t < L) {
      const i64 l = order.token(p.b, p.g, t);
      inputs.push(get<T>(x.at(p.b, l, p.g) + p.c));
      if (t >= p.begin) {
        slope = get<T>(dy + ((p.b * L + l) * G + p.g) * C + p.c);
        if (kSilu) {
          const T sum = bias + inputs.dot(weight), gate = T(1) / (T(1) + exp_(-sum));
          slope *= gate * (T(1) + sum * (T(1) - gate));
        }
      }
    }
    slopes.push(slope);
    if (t >= p.begin && t < p.end) {
      sum_bias += slope;
#pragma unroll
      for (int k = 0; k < K; ++k) sums[k] += slope * inputs.values[k];
    }
    const i64 done = t - K + 1;
    if (done >= p.begin && done < p.end) {
      put(dx + ((p.b * L + order.token(p.b, p.g, done)) * G + p.g) * C + p.c, slopes.dot(reversed));
    }
  }
  const i64 at = ((p.b * segments + p.segment) * G + p.g) * C + p.c;
#pragma unroll
  for (int k = 0; k < K; ++k) dweight[at * K + k] = sums[k];
  dbias[at] = sum_bias;
}
