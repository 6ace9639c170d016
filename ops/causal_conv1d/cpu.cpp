// Causal depthwise convolution along a scan order on the CPU, forward and backward. Lanes are channels. A task is a
// segment of steps of a group of a batch item; it goes over tiles of kSteps steps, vector by vector: a token's next
// vector is the next cache line. Within a tile the last inputs stay in registers; those in front of it are read again.
//
//   s_t = bias + sum_k w_k x_{t - K + 1 + k},  x before the first step is 0;  y_t = s_t or silu(s_t)
//   dx_t = sum_j w_{K - 1 - j} ds_{t + j};  dw_k = sum_t ds_t x_{t - K + 1 + k};  dbias = sum_t ds_t

#include "../kernel.h"

namespace linzoo {
namespace {

constexpr int kSteps = 32;

template <class S, class T>
struct Problem {
  const S* x;
  int64_t x_batch, x_token, x_group;
  const T *weight, *bias;  // (G, K, C), (G, C) or null
  const int32_t* order;    // null for 0 .. L-1
  int64_t order_batch;
  int64_t B, L, G, C, segments, segment_steps;
};

// A segment of one group of one batch item.
template <class S, class T>
struct Segment {
  const Problem<S, T>& p;
  int64_t index, b, g, begin, end;
  Segment(const Problem<S, T>& p, int64_t task) : p(p), index(task / p.G), b(index / p.segments), g(task % p.G) {
    begin = index % p.segments * p.segment_steps;
    end = std::min(p.L, begin + p.segment_steps);
  }
  int64_t token(int64_t t) const { return p.order ? p.order[b * p.order_batch + g * p.L + t] : t; }
  const S* x(int64_t t) const { return p.x + b * p.x_batch + token(t) * p.x_token + g * p.x_group; }
  int64_t row(int64_t t) const { return ((b * p.L + token(t)) * p.G + g) * p.C; }  // of a contiguous (B, L, G, C)
};

template <class S, class T, class F>
void for_segments(const Problem<S, T>& p, F f) {
  torch::stable::parallel_for(0, p.B * p.segments * p.G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(Segment<S, T>(p, task));
  });
}

// Weights and bias of a vector of channels, and the last K inputs; the newest is the last.
template <class T, int K>
struct Taps {
  using V = typename Simd<T>::vec;
  V weight[K], bias = {}, window[K] = {};
  template <class S>
  Taps(const Segment<S, T>& s, int64_t c, int lanes, int64_t first) {
    for (int k = 0; k < K; ++k) weight[k] = load<T>(s.p.weight + (s.g * K + k) * s.p.C + c, lanes);
    if (s.p.bias) bias = load<T>(s.p.bias + s.g * s.p.C + c, lanes);
    for (int64_t t = std::max<int64_t>(first - K + 1, 0); t < first; ++t) push(load<T>(s.x(t) + c, lanes));
  }
  void push(V x) {
    for (int k = 0; k + 1 < K; ++k) window[k] = window[k + 1];
    window[K - 1] = x;
  }
  V sum() const {
    V s = bias;
    for (int k = 0; k < K; ++k) s += weight[k] * window[k];
    return s;
  }
};

template <class T, class V = typename Simd<T>::vec>
inline V sigmoid(V x) {
  return T(1) / (exp2(x * T(-1.4426950408889634)) + T(1));
}

template <int K, bool kSilu, class S, class T>
void run_forward(const Problem<S, T>& p, S* y) {
  constexpr int W = Simd<T>::width;
  for_segments(p, [&](const Segment<S, T>& s) {
    for (int64_t first = s.begin; first < s.end; first += kSteps) {
      const int steps = static_cast<int>(std::min<int64_t>(kSteps, s.end - first));
      const S* rows[kSteps];
      S* out[kSteps];
      for (int i = 0; i < steps; ++i) rows[i] = s.x(first + i), out[i] = y + s.row(first + i);
      for (int64_t c = 0; c < p.C; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, p.C - c));
        Taps<T, K> taps(s, c, lanes, first);
        for (int i = 0; i < steps; ++i) {
          taps.push(load<T>(rows[i] + c, lanes));
          const auto sum = taps.sum();
          store<T>(out[i] + c, kSilu ? sum * sigmoid<T>(sum) : sum, lanes);
        }
      }
    }
  });
}

// sums: (B segments, G, K + 1, C), of the gradients of the taps and, in the last row, of the bias.
template <int K, bool kSilu, class S, class T>
void run_backward(const Problem<S, T>& p, const S* dy, S* dx, T* sums) {
  constexpr int W = Simd<T>::width;
  using V = typename Simd<T>::vec;
  for_segments(p, [&](const Segment<S, T>& s) {
    T* totals = sums + (s.index * p.G + s.g) * (K + 1) * p.C;
    std::fill(totals, totals + (K + 1) * p.C, T(0));
    for (int64_t first = s.begin; first < s.end; first += kSteps) {
      const int steps = static_cast<int>(std::min<int64_t>(kSteps, s.end - first));
      const int ahead = static_cast<int>(std::min<int64_t>(steps + K - 1, p.L - first));  // what the last inputs reach
      const S* rows[kSteps + K];
      int64_t places[kSteps + K];
      for (int i = 0; i < ahead; ++i) rows[i] = s.x(first + i), places[i] = s.row(first + i);
      for (int64_t c = 0; c < p.C; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, p.C - c));
        Taps<T, K> taps(s, c, lanes, first);
        V slopes[K] = {}, dweight[K] = {}, dbias = {};  // slopes: the last K ds, the newest is the last
        for (int i = 0; i < steps + K - 1; ++i) {
          V ds = {};
          if (i < ahead) {
            taps.push(load<T>(rows[i] + c, lanes));
            ds = load<T>(dy + places[i] + c, lanes);
            if (kSilu) {
              const V sum = taps.sum(), gate = sigmoid<T>(sum);
              ds *= gate * (sum * (T(1) - gate) + T(1));
            }
          }
          if (i < steps) {
            for (int k = 0; k < K; ++k) dweight[k] += ds * taps.window[k];
            dbias += ds;
          }
          for (int k = 0; k + 1 < K; ++k) slopes[k] = slopes[k + 1];
          slopes[K - 1] = ds;
          if (i >= K - 1) {
            V sum = {};
            for (int j = 0; j < K; ++j) sum += taps.weight[K - 1 - j] * slopes[j];
            store<T>(dx + places[i - K + 1] + c, sum, lanes);
          }
        }
        for (int k = 0; k <= K; ++k) {
          T* total = totals + k * p.C + c;
          store<T>(total, load<T>(total, lanes) + (k < K ? dweight[k] : dbias), lanes);
        }
      }
    }
  });
}

// f(K, silu) as constants.
template <class F>
void with_constants(int64_t taps, bool silu, F f) {
  auto with = [&](auto K) { silu ? f(K, std::true_type{}) : f(K, std::false_type{}); };
  switch (taps) {
    case 2: return with(std::integral_constant<int, 2>{});
    case 3: return with(std::integral_constant<int, 3>{});
    case 4: return with(std::integral_constant<int, 4>{});
    default: STD_TORCH_CHECK(false, "weight: expected 2 to 4 taps, got ", taps);
  }
}

template <class S, class T>
Problem<S, T> problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& order, int64_t segment_steps) {
  Problem<S, T> p;
  p.x = static_cast<const S*>(x.data_ptr());
  p.x_batch = x.stride(0), p.x_token = x.stride(1), p.x_group = x.stride(2);
  p.weight = static_cast<const T*>(weight.data_ptr());
  p.bias = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
  p.B = x.size(0), p.L = x.size(1), p.G = x.size(2), p.C = x.size(3);
  p.order = tokens_of(order, p.L);
  p.order_batch = order && order->dim() == 3 ? p.G * p.L : 0;
  p.segment_steps = segment_steps, p.segments = (p.L + segment_steps - 1) / segment_steps;
  return p;
}

void forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> order, bool silu,
             int64_t segment_steps, Tensor y) {
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    const auto p = problem<S, decltype(t)>(x, weight, bias, order, segment_steps);
    with_constants(weight.size(1), silu, [&](auto K, auto kSilu) {
      run_forward<decltype(K)::value, decltype(kSilu)::value>(p, static_cast<S*>(y.data_ptr()));
    });
  });
}

void backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> order, bool silu,
              int64_t segment_steps, Tensor dx, Tensor sums) {
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const auto p = problem<S, T>(x, weight, bias, order, segment_steps);
    with_constants(weight.size(1), silu, [&](auto K, auto kSilu) {
      run_backward<decltype(K)::value, decltype(kSilu)::value>(
          p, static_cast<const S*>(dy.data_ptr()), static_cast<S*>(dx.data_ptr()), static_cast<T*>(sums.data_ptr()));
    });
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu, int segment_steps, "
      "Tensor(a!) y) -> ()");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu, int "
      "segment_steps, Tensor(a!) dx, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&linzoo::forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&linzoo::backward));
}
