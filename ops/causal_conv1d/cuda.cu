// Causal depthwise convolution along a scan order on CUDA. A thread is a channel of a group of a batch item and a
// segment of its steps, which it walks with the last K inputs in registers.
//
//   y_t = act(bias + sum_k weight_k x_{t - K + 1 + k}),  x before the first step is 0

#include "device.cuh"

constexpr int kAtOnce = 8;  // steps whose inputs a thread reads at once

// The tokens of steps [t, t + kAtOnce) of a segment; behind its last step that one's.
__device__ __forceinline__ void read_tokens(int (&out)[kAtOnce], const Order& order, const Place& p, i64 t, i64 last) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) out[i] = static_cast<int>(order.token(p.b, p.g, smaller(t + i, last)));
}

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
            i64 order_batch, i64 L, i64 G, i64 C, i64 blocks, i64 segments, i64 segment_steps, S* y_) {
  const Place p(G, C, L, blocks, segments, segment_steps);
  if (!p.active) return;
  const Order order{order_, order_batch, L};
  const Tokens<const S> x(x_, p.b * x_batch + p.g * x_group + p.c, x_token);
  const Tokens<S> y(y_, (p.b * L * G + p.g) * C + p.c, G * C);
  T weight[K];
#pragma unroll
  for (int k = 0; k < K; ++k) weight[k] = weights[(p.g * C + p.c) * K + k];
  const T bias = biases ? biases[p.g * C + p.c] : T(0);
  Window<T, K> window;
  for (i64 start = larger<i64>(p.begin - K + 1, 0); start < p.end; start += kAtOnce) {
    int tokens[kAtOnce];
    Pack<S, 1> values[kAtOnce];
    read_tokens(tokens, order, p, start, p.end - 1);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = read<1>(x.at(tokens[i]));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      window.push(get<T>(values[i].x));
      const T sum = bias + window.dot(weight);
      if (start + i >= p.begin && start + i < p.end) write_one(y.at(tokens[i]), kSilu ? sum * sigmoid(sum) : sum);
    }
  }
}

// dweight (B, segments, G, C, K) and dbias (B, segments, G, C) are sums over the steps of a segment. The gradient of
// x_t needs the K - 1 outputs behind it: the walk goes on so far beyond the segment.
template <class S, class T, int K, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy_, const S* x_, i64 x_batch, i64 x_token, i64 x_group, const T* weights, const T* biases,
             const int* order_, i64 order_batch, i64 L, i64 G, i64 C, i64 blocks, i64 segments, i64 segment_steps,
             S* dx_, T* dweight, T* dbias) {
  const Place p(G, C, L, blocks, segments, segment_steps);
  if (!p.active) return;
  const Order order{order_, order_batch, L};
  const Tokens<const S> x(x_, p.b * x_batch + p.g * x_group + p.c, x_token);
  const Tokens<const S> dy(dy_, (p.b * L * G + p.g) * C + p.c, G * C);
  const Tokens<S> dx(dx_, (p.b * L * G + p.g) * C + p.c, G * C);
  T weight[K], reversed[K], sums[K] = {}, sum_bias = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) weight[k] = reversed[K - 1 - k] = weights[(p.g * C + p.c) * K + k];
  const T bias = biases ? biases[p.g * C + p.c] : T(0);
  Window<T, K> inputs, slopes;
  for (i64 start = larger<i64>(p.begin - K + 1, 0); start < p.end + K - 1; start += kAtOnce) {
    int tokens[kAtOnce];
    Pack<S, 1> values[kAtOnce], gradients[kAtOnce];
    read_tokens(tokens, order, p, start, L - 1);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = read<1>(x.at(tokens[i]));
      gradients[i] = read<1>(dy.at(tokens[i]));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i64 t = start + i, done = t - K + 1;
      inputs.push(get<T>(values[i].x));
      T slope = t >= p.begin && t < L ? get<T>(gradients[i].x) : T(0);
      if (kSilu) {
        const T sum = bias + inputs.dot(weight), gate = sigmoid(sum);
        slope *= gate * (T(1) + sum * (T(1) - gate));
      }
      slopes.push(slope);
      if (t >= p.begin && t < p.end) {
        sum_bias += slope;
#pragma unroll
        for (int k = 0; k < K; ++k) sums[k] += slope * inputs.values[k];
      }
      if (done >= p.begin && done < p.end) write_one(dx.at(order.token(p.b, p.g, done)), slopes.dot(reversed));
    }
  }
  const i64 at = ((p.b * segments + p.segment) * G + p.g) * C + p.c;
#pragma unroll
  for (int k = 0; k < K; ++k) dweight[at * K + k] = sums[k];
  dbias[at] = sum_bias;
}
