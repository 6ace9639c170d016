// Selective scan on the CPU, forward and backward. Lanes are channels; a task is a (batch, group, split of the channels)
// and walks its tokens in chunks of `kChunk`. Which channels form a task follows from the problem's shape alone, and every
// sum over channels, batch and groups has a fixed order: results do not depend on the number of threads.
//
//   delta = softplus(dt_weight dt + dt_bias);  h_t = exp(delta A) h_{t-1} + delta B_t u_t;  y_t = C_t h_t + D u_t
//
// Layouts: activations (batch, token, group, channel) with any strides but the last, which is 1; parameters transposed so
// that channels are contiguous: A (G, N, D), dt_weight (G, R, D). States before each chunk: (batch, G, chunk, N, D).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "../simd.h"

namespace linzoo {
namespace {

using torch::stable::Tensor;

constexpr int kChunk = 32;  // also CHUNK in __init__.py
constexpr int kMaxVecs = 4; // vectors of channels walked together

template <class S>
struct Activation {  // (batch, token, group, channel)
  S* data = nullptr;
  int64_t batch = 0, token = 0, group = 0;
  Activation() = default;
  explicit Activation(const Tensor& t)
      : data(static_cast<S*>(t.data_ptr())), batch(t.stride(0)), token(t.stride(1)), group(t.stride(2)) {}
  S* at(int64_t b, int64_t l, int64_t g) const { return data + b * batch + l * token + g * group; }
};

struct Sizes {
  int64_t B, L, G, D, N, R, steps, chunks, splits, split_channels;
  bool low_rank, has_bias, has_skip, softplus, merge;
};

template <class S, class T>
struct Problem : Sizes {
  Activation<const S> u, dt, Bm, Cm;
  const T *A, *skip, *dt_weight, *dt_bias;  // A is scaled by log2(e)
  const int32_t* order;
  int64_t order_batch;
  T* states;
  int64_t token(int64_t b, int64_t g, int64_t t) const { return order ? order[b * order_batch + g * steps + t] : t; }
  T* state(int64_t b, int64_t g, int64_t chunk) const { return states + (((b * G + g) * chunks + chunk) * N) * D; }
};

// What both directions need of a chunk, for up to kMaxVecs vectors of channels.
template <class T>
struct Chunk {
  using V = typename Simd<T>::vec;
  int64_t first, length;
  int64_t tokens[kChunk];
  V delta[kChunk][kMaxVecs], u[kChunk][kMaxVecs], slope[kChunk][kMaxVecs];
};

// u, delta and (for the backward pass) d delta / d (its pre-activation) of a chunk.
template <bool kSlope, class S, class T>
void load_steps(const Problem<S, T>& p, int64_t b, int64_t g, int64_t d0, int64_t dn, Chunk<T>& c) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int vecs = static_cast<int>((dn + W - 1) / W);
  const T* weight = p.low_rank ? p.dt_weight + g * p.R * p.D + d0 : nullptr;
  const V one = broadcast<T>(1);
  V bias[kMaxVecs] = {};
  for (int v = 0; v < vecs && p.has_bias; ++v)
    bias[v] = load<T>(p.dt_bias + g * p.D + d0 + v * W, std::min<int64_t>(W, dn - v * W));
  for (int64_t t = 0; t < c.length; ++t) {
    const S* u = p.u.at(b, c.tokens[t], g) + d0;
    const S* dt = p.dt.at(b, c.tokens[t], g);
    for (int v = 0; v < vecs; ++v) {
      const int n = static_cast<int>(std::min<int64_t>(W, dn - v * W));
      V x = bias[v];
      if (p.low_rank) {
        for (int64_t r = 0; r < p.R; ++r) x += load<T>(weight + r * p.D + v * W, n) * static_cast<T>(dt[r]);
      } else {
        x += load<T>(dt + d0 + v * W, n);
      }
      c.u[t][v] = load<T>(u + v * W, n);
      if (p.softplus) {
        c.delta[t][v] = softplus(x, kSlope ? &c.slope[t][v] : nullptr);
      } else {
        c.delta[t][v] = x;
        if (kSlope) c.slope[t][v] = one;
      }
    }
  }
}

// Runs chunk by chunk through `visit(chunk index, Chunk&)`, forwards or backwards.
template <class S, class T, class F>
void for_chunks(const Problem<S, T>& p, int64_t b, int64_t g, bool reverse, Chunk<T>& c, F visit) {
  for (int64_t i = 0; i < p.chunks; ++i) {
    const int64_t k = reverse ? p.chunks - 1 - i : i;
    c.first = k * kChunk;
    c.length = std::min<int64_t>(kChunk, p.steps - c.first);
    for (int64_t t = 0; t < c.length; ++t) c.tokens[t] = p.token(b, g, c.first + t);
    visit(k);
  }
}

template <class S, class T>
void forward_channels(const Problem<S, T>& p, Activation<S> y, T* merged, int64_t b, int64_t g, int64_t d0, int64_t dn) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int vecs = static_cast<int>((dn + W - 1) / W);
  std::vector<V> h(p.N * vecs, V{});
  V skip[kMaxVecs] = {}, out[kChunk][kMaxVecs];
  for (int v = 0; v < vecs && p.has_skip; ++v)
    skip[v] = load<T>(p.skip + g * p.D + d0 + v * W, std::min<int64_t>(W, dn - v * W));
  Chunk<T> c;
  for_chunks(p, b, g, false, c, [&](int64_t k) {
    load_steps<false>(p, b, g, d0, dn, c);
    for (int64_t t = 0; t < c.length; ++t)
      for (int v = 0; v < vecs; ++v) {
        out[t][v] = skip[v] * c.u[t][v];
        c.u[t][v] *= c.delta[t][v];
      }
    for (int64_t n = 0; n < p.N; ++n) {
      T Bn[kChunk], Cn[kChunk];
      for (int64_t t = 0; t < c.length; ++t) {
        Bn[t] = static_cast<T>(p.Bm.at(b, c.tokens[t], g)[n]);
        Cn[t] = static_cast<T>(p.Cm.at(b, c.tokens[t], g)[n]);
      }
      for (int v = 0; v < vecs; ++v) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, dn - v * W));
        const V A = load<T>(p.A + (g * p.N + n) * p.D + d0 + v * W, lanes);
        V state = h[n * vecs + v];
        if (p.states) store<T>(p.state(b, g, k) + n * p.D + d0 + v * W, state, lanes);
        for (int64_t t = 0; t < c.length; ++t) {
          state = exp2(c.delta[t][v] * A) * state + c.u[t][v] * Bn[t];
          out[t][v] += state * Cn[t];
        }
        h[n * vecs + v] = state;
      }
    }
    for (int64_t t = 0; t < c.length; ++t)
      for (int v = 0; v < vecs; ++v) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, dn - v * W));
        if (merged) {
          T* row = merged + c.tokens[t] * p.split_channels + (d0 % p.split_channels) + v * W;
          store<T>(row, load<T>(row, lanes) + out[t][v], lanes);
        } else {
          store<T>(y.at(b, c.tokens[t], g) + d0 + v * W, out[t][v], lanes);
        }
      }
  });
}

template <class S, class T>
struct Gradients {
  Activation<const S> dy;
  Activation<S> du, ddt;  // ddt only without the low-rank step
  // Sums over the channels of a split, (split, batch, token, group, -), and over tokens, (batch, G, -, D).
  T *dB, *dC, *ddt_low, *dA, *dskip, *dweight, *dbias;
};

template <class S, class T>
void backward_channels(const Problem<S, T>& p, const Gradients<S, T>& o, int64_t b, int64_t g, int64_t split, int64_t d0,
                       int64_t dn, typename Simd<T>::vec* scratch) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int vecs = static_cast<int>((dn + W - 1) / W);
  const int64_t N = p.N, R = p.low_rank ? p.R : 0;
  V* carry = scratch;              // dL/dh_t decayed from the step after, (N, vecs)
  V* dA = carry + N * vecs;        // (N, vecs)
  V* dweight = dA + N * vecs;      // (R, vecs)
  V* dB = dweight + R * vecs;      // sums over vecs, lane by lane, (kChunk, N)
  V* dC = dB + kChunk * N;         // (kChunk, N)
  std::fill(carry, dB, V{});
  V skip[kMaxVecs] = {}, dskip[kMaxVecs] = {}, dbias[kMaxVecs] = {};
  for (int v = 0; v < vecs && p.has_skip; ++v)
    skip[v] = load<T>(p.skip + g * p.D + d0 + v * W, std::min<int64_t>(W, dn - v * W));
  const T* weight = p.low_rank ? p.dt_weight + g * p.R * p.D + d0 : nullptr;
  const T ln2 = static_cast<T>(0.6931471805599453);
  V dy[kChunk][kMaxVecs], dx[kChunk][kMaxVecs], ddelta[kChunk][kMaxVecs], decay[kChunk], h[kChunk + 1];
  Chunk<T> c;
  for_chunks(p, b, g, true, c, [&](int64_t k) {
    load_steps<true>(p, b, g, d0, dn, c);
    for (int64_t t = 0; t < c.length; ++t) {
      const S* grad = o.dy.at(b, c.tokens[t], g) + d0;
      for (int v = 0; v < vecs; ++v) {
        dy[t][v] = load<T>(grad + v * W, static_cast<int>(std::min<int64_t>(W, dn - v * W)));
        dx[t][v] = ddelta[t][v] = V{};  // dx: dL/d(delta u)
      }
    }
    std::fill(dB, dB + 2 * kChunk * N, V{});
    for (int64_t n = 0; n < N; ++n) {
      T Bn[kChunk], Cn[kChunk];
      for (int64_t t = 0; t < c.length; ++t) {
        Bn[t] = static_cast<T>(p.Bm.at(b, c.tokens[t], g)[n]);
        Cn[t] = static_cast<T>(p.Cm.at(b, c.tokens[t], g)[n]);
      }
      for (int v = 0; v < vecs; ++v) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, dn - v * W));
        const V A = load<T>(p.A + (g * N + n) * p.D + d0 + v * W, lanes);
        h[0] = load<T>(p.state(b, g, k) + n * p.D + d0 + v * W, lanes);
        for (int64_t t = 0; t < c.length; ++t) {
          decay[t] = exp2(c.delta[t][v] * A);
          h[t + 1] = decay[t] * h[t] + c.delta[t][v] * c.u[t][v] * Bn[t];
        }
        V grad = carry[n * vecs + v], sum_A = dA[n * vecs + v];
        for (int64_t t = c.length - 1; t >= 0; --t) {
          dC[t * N + n] += dy[t][v] * h[t + 1];
          grad += dy[t][v] * Cn[t];
          dB[t * N + n] += grad * c.delta[t][v] * c.u[t][v];
          dx[t][v] += grad * Bn[t];
          grad *= decay[t];
          const V through_decay = grad * h[t];
          ddelta[t][v] += through_decay * A;
          sum_A += through_decay * c.delta[t][v];
        }
        carry[n * vecs + v] = grad;
        dA[n * vecs + v] = sum_A;
      }
    }
    for (int64_t t = 0; t < c.length; ++t) {
      const int64_t row = ((split * p.B + b) * p.L + c.tokens[t]) * p.G + g;
      for (int64_t n = 0; n < N; ++n) {
        o.dB[row * N + n] += horizontal_sum(dB[t * N + n]);
        o.dC[row * N + n] += horizontal_sum(dC[t * N + n]);
      }
      for (int v = 0; v < vecs; ++v) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, dn - v * W));
        store<T>(o.du.at(b, c.tokens[t], g) + d0 + v * W, dx[t][v] * c.delta[t][v] + skip[v] * dy[t][v], lanes);
        // ddelta so far counts A in units of log2(e)
        ddelta[t][v] = (ddelta[t][v] * ln2 + dx[t][v] * c.u[t][v]) * c.slope[t][v];
        dskip[v] += dy[t][v] * c.u[t][v];
        dbias[v] += ddelta[t][v];
        if (!p.low_rank) store<T>(o.ddt.at(b, c.tokens[t], g) + d0 + v * W, ddelta[t][v], lanes);
      }
      const S* low = p.dt.at(b, c.tokens[t], g);
      for (int64_t r = 0; r < R; ++r) {
        V sum = {};
        for (int v = 0; v < vecs; ++v) {
          sum += ddelta[t][v] * load<T>(weight + r * p.D + v * W, static_cast<int>(std::min<int64_t>(W, dn - v * W)));
          dweight[r * vecs + v] += ddelta[t][v] * static_cast<T>(low[r]);
        }
        o.ddt_low[row * R + r] += horizontal_sum(sum);
      }
    }
  });
  const int64_t bg = b * p.G + g;
  for (int v = 0; v < vecs; ++v) {
    const int lanes = static_cast<int>(std::min<int64_t>(W, dn - v * W));
    const int64_t d = d0 + v * W;
    for (int64_t n = 0; n < N; ++n) store<T>(o.dA + (bg * N + n) * p.D + d, dA[n * vecs + v], lanes);
    for (int64_t r = 0; r < R; ++r) store<T>(o.dweight + (bg * R + r) * p.D + d, dweight[r * vecs + v], lanes);
    if (p.has_skip) store<T>(o.dskip + bg * p.D + d, dskip[v], lanes);
    if (p.has_bias) store<T>(o.dbias + bg * p.D + d, dbias[v], lanes);
  }
}

// Calls f(d0, dn) for the blocks of at most kMaxVecs vectors that make up a split of the channels.
template <class T, class F>
void for_blocks(const Sizes& s, int64_t split, F f) {
  const int64_t block = Simd<T>::width * (s.N > 4 ? 1 : kMaxVecs);  // many states: keep a block's sums in the L1 cache
  const int64_t end = std::min(s.D, (split + 1) * s.split_channels);
  for (int64_t d = split * s.split_channels; d < end; d += block) f(d, std::min(block, end - d));
}

template <class S, class T>
void run_forward(const Problem<S, T>& p, const Tensor& y) {
  const Activation<S> none;
  torch::stable::parallel_for(0, p.B * (p.merge ? 1 : p.G) * p.splits, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> merged(p.merge ? p.L * p.split_channels : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.splits, bg = task / p.splits;
      if (!p.merge) {
        for_blocks<T>(p, split, [&](int64_t d0, int64_t dn) {
          forward_channels(p, Activation<S>(y), static_cast<T*>(nullptr), bg / p.G, bg % p.G, d0, dn);
        });
        continue;
      }
      std::fill(merged.begin(), merged.end(), T(0));
      for (int64_t g = 0; g < p.G; ++g)
        for_blocks<T>(p, split, [&](int64_t d0, int64_t dn) { forward_channels(p, none, merged.data(), bg, g, d0, dn); });
      const int64_t d0 = split * p.split_channels, dn = std::min(p.D - d0, p.split_channels);
      S* out = static_cast<S*>(y.data_ptr()) + bg * p.L * p.D + d0;
      for (int64_t l = 0; l < p.L; ++l)
        for (int64_t d = 0; d < dn; ++d) out[l * p.D + d] = static_cast<S>(merged[l * p.split_channels + d]);
    }
  });
}

template <class S, class T>
void run_backward(const Problem<S, T>& p, const Gradients<S, T>& o) {
  torch::stable::parallel_for(0, p.B * p.G * p.splits, 1, [&](int64_t begin, int64_t end) {
    std::vector<typename Simd<T>::vec> scratch((2 * p.N + p.R) * kMaxVecs + 2 * kChunk * p.N);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.splits, bg = task / p.splits;
      for_blocks<T>(p, split, [&](int64_t d0, int64_t dn) {
        backward_channels(p, o, bg / p.G, bg % p.G, split, d0, dn, scratch.data());
      });
    }
  });
}

template <class S, class T>
Problem<S, T> problem(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                      const std::optional<Tensor>& D, const std::optional<Tensor>& dt_weight,
                      const std::optional<Tensor>& dt_bias, bool softplus, const std::optional<Tensor>& order, bool merge,
                      int64_t split_channels, const Tensor& states) {
  Problem<S, T> p;
  p.B = u.size(0), p.L = u.size(1), p.G = u.size(2), p.D = u.size(3), p.N = A.size(1);
  p.low_rank = dt_weight.has_value(), p.has_bias = dt_bias.has_value(), p.has_skip = D.has_value();
  p.R = p.low_rank ? dt_weight->size(1) : 0;
  p.steps = order ? order->size(order->dim() - 1) : p.L;
  p.chunks = (p.steps + kChunk - 1) / kChunk;
  p.split_channels = split_channels;
  p.splits = (p.D + split_channels - 1) / split_channels;
  p.softplus = softplus, p.merge = merge;
  p.u = Activation<const S>(u), p.dt = Activation<const S>(dt);
  p.Bm = Activation<const S>(B), p.Cm = Activation<const S>(C);
  p.A = static_cast<const T*>(A.data_ptr());
  p.skip = D ? static_cast<const T*>(D->data_ptr()) : nullptr;
  p.dt_weight = dt_weight ? static_cast<const T*>(dt_weight->data_ptr()) : nullptr;
  p.dt_bias = dt_bias ? static_cast<const T*>(dt_bias->data_ptr()) : nullptr;
  p.order = order ? static_cast<const int32_t*>(order->data_ptr()) : nullptr;
  p.order_batch = order && order->dim() == 3 ? p.G * p.steps : 0;
  p.states = states.numel() ? static_cast<T*>(states.data_ptr()) : nullptr;
  if (order) {
    for (int64_t i = 0; i < order->numel(); ++i)
      STD_TORCH_CHECK(p.order[i] >= 0 && p.order[i] < p.L, "order: every entry must lie in [0, ", p.L, "), got ",
                      p.order[i], " at flat index ", i);
  }
  return p;
}

template <class F>
void dispatch(const Tensor& u, F f) {
  using torch::headeronly::ScalarType;
  switch (u.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{}, float{});
    case ScalarType::Half: return f(c10::Half{}, float{});
    default: STD_TORCH_CHECK(false, "u: expected float64, float32, bfloat16 or float16");
  }
}

void forward(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D, std::optional<Tensor> dt_weight,
             std::optional<Tensor> dt_bias, bool softplus, std::optional<Tensor> order, bool merge, int64_t split_channels,
             Tensor y, Tensor states) {
  dispatch(u, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_forward(problem<S, T>(u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, merge, split_channels, states), y);
  });
}

void backward(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
              std::optional<Tensor> dt_weight, std::optional<Tensor> dt_bias, bool softplus, std::optional<Tensor> order,
              int64_t split_channels, Tensor states, Tensor du, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dskip,
              Tensor dweight, Tensor dbias) {
  dispatch(u, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    auto data = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
    Gradients<S, T> o;
    o.dy = Activation<const S>(dy), o.du = Activation<S>(du);
    if (dt_weight) o.ddt_low = data(ddt); else o.ddt = Activation<S>(ddt);
    o.dA = data(dA), o.dB = data(dB), o.dC = data(dC);
    o.dskip = data(dskip), o.dweight = data(dweight), o.dbias = data(dbias);
    run_backward(problem<S, T>(u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, false, split_channels, states), o);
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def(
      "selective_scan_forward(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, "
      "Tensor? dt_bias, bool softplus, Tensor? order, bool merge, int split_channels, Tensor(a!) y, Tensor(b!) states) -> ()");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? dt_weight, Tensor? dt_bias, bool softplus, Tensor? order, int split_channels, Tensor states, Tensor(a!) du, "
      "Tensor(b!) ddt, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!) dD, Tensor(g!) ddt_weight, "
      "Tensor(h!) ddt_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&linzoo::forward));
  m.impl("selective_scan_backward", TORCH_BOX(&linzoo::backward));
}
