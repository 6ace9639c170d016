// Selective scan on the CPU, forward and backward. Lanes are channels; a task is a (batch, group, split of the
// channels) and walks its tokens in chunks of `kChunk`. Which channels form a task follows from the problem's shape
// alone, and every sum over channels, batch and groups has a fixed order: results do not depend on the number of
// threads.
//
//   delta = softplus(dt_weight dt + dt_bias);  h_t = exp(delta A) h_{t-1} + delta B_t u_t;  y_t = C_t h_t + D u_t
//
// Layouts: activations (batch, token, group, channel) with any strides but the last, which is 1; parameters transposed
// so that channels are contiguous: A (G, N, D), dt_weight (G, R, D). States before each chunk: (batch, G, chunk, N, D).

#include "../kernel.h"

namespace linzoo {
namespace {

constexpr int kChunk = LINZOO_CHUNK;
constexpr int kMaxVecs = 4;  // vectors of channels walked together

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
  bool low_rank, softplus, merge;
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

// A block of channels: up to kMaxVecs vectors from channel `first` of group `group`, with its parameters at hand.
template <class T>
struct Block {
  using V = typename Simd<T>::vec;
  int64_t batch, group, first;
  int vecs, lanes[kMaxVecs];
  V skip[kMaxVecs], dt_bias[kMaxVecs];
  std::vector<V> A, dt_weight;  // (N, vecs), (R, vecs)

  template <class S>
  Block(const Problem<S, T>& p, int64_t b, int64_t g, int64_t d0, int64_t dn) : batch(b), group(g), first(d0) {
    constexpr int W = Simd<T>::width;
    vecs = static_cast<int>((dn + W - 1) / W);
    for (int v = 0; v < vecs; ++v) lanes[v] = static_cast<int>(std::min<int64_t>(W, dn - v * W));
    auto rows = [&](const T* x, int64_t n, V* out) {
      for (int64_t i = 0; i < n; ++i)
        for (int v = 0; v < vecs; ++v)
          out[i * vecs + v] = x ? load<T>(x + (g * n + i) * p.D + d0 + v * W, lanes[v]) : V{};
    };
    A.resize(p.N * vecs);
    dt_weight.resize(p.R * vecs);
    rows(p.A, p.N, A.data());
    rows(p.dt_weight, p.R, dt_weight.data());
    rows(p.skip, 1, skip);
    rows(p.dt_bias, 1, dt_bias);
  }

  // The block's channels of a token's row.
  template <class S>
  V get(const S* row, int v) const {
    return load<T>(row + first + v * Simd<T>::width, lanes[v]);
  }
  template <class S>
  void put(S* row, int v, V x) const {
    store<T>(row + first + v * Simd<T>::width, x, lanes[v]);
  }
};

// Asks for the cache lines of a block's channels in a row that will be read (or written) a chunk later: orders jump
// across the image, which no hardware prefetcher follows.
template <bool kWrite, class S, class T>
void prefetch(const Block<T>& block, const S* row) {
  for (int64_t d = 0; d < block.vecs * Simd<T>::width; d += 64 / sizeof(S))
    __builtin_prefetch(row + block.first + d, kWrite, 2);
}

// Successive steps of a block. `input` is delta u; `slope` is d delta / d (its value before softplus).
template <class T>
struct Chunk {
  using V = typename Simd<T>::vec;
  int64_t length, tokens[kChunk];
  V u[kMaxVecs][kChunk], delta[kMaxVecs][kChunk], input[kMaxVecs][kChunk], slope[kMaxVecs][kChunk];
};

template <bool kSlope, class S, class T>
void load_chunk(const Problem<S, T>& p, const Block<T>& block, int64_t k, Chunk<T>& c) {
  using V = typename Simd<T>::vec;
  const int64_t b = block.batch, g = block.group;
  const int vecs = block.vecs;
  c.length = std::min<int64_t>(kChunk, p.steps - k * kChunk);
  for (int64_t t = 0; t < c.length; ++t) {
    c.tokens[t] = p.token(b, g, k * kChunk + t);
    const int64_t next = std::min(std::max<int64_t>((kSlope ? k - 1 : k + 1) * kChunk + t, 0), p.steps - 1);
    prefetch<false>(block, p.u.at(b, p.token(b, g, next), g));
    const S* u = p.u.at(b, c.tokens[t], g);
    const S* dt = p.dt.at(b, c.tokens[t], g);
    for (int v = 0; v < vecs; ++v) {
      V x = block.dt_bias[v] + (p.low_rank ? V{} : block.get(dt, v));
      for (int64_t r = 0; r < p.R; ++r) x += block.dt_weight[r * vecs + v] * static_cast<T>(dt[r]);
      if (!p.softplus) {
        c.delta[v][t] = x;
        c.slope[v][t] = broadcast<T>(1);
      } else if (kSlope) {
        c.delta[v][t] = softplus<T>(x, c.slope[v][t]);
      } else {
        c.delta[v][t] = softplus<T>(x);
      }
      c.u[v][t] = block.get(u, v);
      c.input[v][t] = c.delta[v][t] * c.u[v][t];
    }
  }
}

// B and C of `K` states from n on, for the steps of a chunk.
template <int K, class S, class T>
void load_projections(const Problem<S, T>& p, const Block<T>& block, const Chunk<T>& c, int64_t n, T (*B)[K],
                      T (*C)[K]) {
  const S *b = p.Bm.at(block.batch, 0, block.group) + n, *cc = p.Cm.at(block.batch, 0, block.group) + n;
  for (int64_t t = 0; t < c.length; ++t) {
    for (int j = 0; j < K; ++j) {
      B[t][j] = static_cast<T>(b[c.tokens[t] * p.Bm.token + j]);
      C[t][j] = static_cast<T>(cc[c.tokens[t] * p.Cm.token + j]);
    }
  }
}

// Calls f(n, integral_constant K) over all N states, four at a time as far as they go.
template <class F>
void for_states(int64_t N, F f) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) f(n, std::integral_constant<int, 4>{});
  for (; n < N; ++n) f(n, std::integral_constant<int, 1>{});
}

// Output of a block's channels; `write(token, v, y)` takes it, vector by vector.
template <class S, class T, class Write>
void forward_block(const Problem<S, T>& p, const Block<T>& block, Write write) {
  using V = typename Simd<T>::vec;
  const int vecs = block.vecs;
  std::vector<V> h(p.N * vecs, V{});
  V y[kMaxVecs][kChunk];
  Chunk<T> c;
  for (int64_t k = 0; k < p.chunks; ++k) {
    load_chunk<false>(p, block, k, c);
    for (int64_t t = 0; t < c.length; ++t)
      for (int v = 0; v < vecs; ++v) y[v][t] = block.skip[v] * c.u[v][t];
    for_states(p.N, [&](int64_t n, auto states) {
      constexpr int K = decltype(states)::value;
      T B[kChunk][K], C[kChunk][K];
      load_projections<K>(p, block, c, n, B, C);
      for (int v = 0; v < vecs; ++v) {
        V A[K], state[K];
        for (int j = 0; j < K; ++j) {
          A[j] = block.A[(n + j) * vecs + v];
          state[j] = h[(n + j) * vecs + v];
          if (p.states) block.put(p.state(block.batch, block.group, k) + (n + j) * p.D, v, state[j]);
        }
        for (int64_t t = 0; t < c.length; ++t) {
          V sum = y[v][t];
          for (int j = 0; j < K; ++j) {
            state[j] = exp2(c.delta[v][t] * A[j]) * state[j] + c.input[v][t] * B[t][j];
            sum += state[j] * C[t][j];
          }
          y[v][t] = sum;
        }
        for (int j = 0; j < K; ++j) h[(n + j) * vecs + v] = state[j];
      }
    });
    for (int64_t t = 0; t < c.length; ++t)
      for (int v = 0; v < vecs; ++v) write(c.tokens[t], v, y[v][t]);
  }
}

template <class S, class T>
struct Gradients {
  Activation<const S> dy;
  Activation<S> du, ddt;  // ddt only without the low-rank step
  Activation<T> merged;   // instead of du where all groups read the same input: (batch, token, 1, channel)
  // Sums over the channels of a split, (split, batch, token, group, -), and over tokens, (batch, G, -, D).
  T *dB, *dC, *ddt_low, *dA, *dskip, *dweight, *dbias;
};

// Sums over a block's channels, one for each step of a chunk and each of `columns` values, gathered lane by lane.
template <class T>
struct ChannelSums {
  using V = typename Simd<T>::vec;
  int64_t columns;
  std::vector<V> lanes;  // (kChunk, columns)
  std::vector<T> sums;
  explicit ChannelSums(int64_t columns) : columns(columns), lanes(kChunk * columns), sums(kChunk * columns) {}
  V& at(int64_t t, int64_t i) { return lanes[t * columns + i]; }
  // Sets, or adds to, the chunk's rows of (token, G, columns); `rows` points to the group's first.
  void put(T* rows, const Chunk<T>& c, int64_t G, bool add) {
    sum_lanes<T>(lanes.data(), kChunk * columns, sums.data());
    for (int64_t t = 0; t < c.length; ++t) {
      T* row = rows + c.tokens[t] * G * columns;
      const T* sum = sums.data() + t * columns;
      for (int64_t i = 0; i < columns; ++i) row[i] = add ? row[i] + sum[i] : sum[i];
    }
  }
};

template <class S, class T>
void backward_block(const Problem<S, T>& p, const Gradients<S, T>& o, const Block<T>& block, int64_t split) {
  using V = typename Simd<T>::vec;
  const int vecs = block.vecs;
  const int64_t b = block.batch, g = block.group, N = p.N, R = p.R;
  const int64_t rows = (split * p.B + b) * p.L * p.G + g;
  const bool add = block.first > split * p.split_channels;                         // not the split's first block
  std::vector<V> carry(N * vecs, V{}), dA(N * vecs, V{}), dweight(R * vecs, V{});  // carry: dL/dh, decayed by one step
  ChannelSums<T> dB(N), dC(N), ddt(R);
  V dskip[kMaxVecs] = {}, dbias[kMaxVecs] = {};
  V dy[kMaxVecs][kChunk], dinput[kMaxVecs][kChunk], ddelta[kMaxVecs][kChunk];
  Chunk<T> c;
  for (int64_t k = p.chunks - 1; k >= 0; --k) {
    load_chunk<true>(p, block, k, c);
    for (int64_t t = 0; t < c.length; ++t) {
      if (o.merged.data) prefetch<true>(block, o.merged.at(b, c.tokens[t], 0));
      else prefetch<true>(block, o.du.at(b, c.tokens[t], g));
      prefetch<false>(block, o.dy.at(b, p.token(b, g, std::max<int64_t>((k - 1) * kChunk + t, 0)), g));
      for (int v = 0; v < vecs; ++v) {
        dy[v][t] = block.get(o.dy.at(b, c.tokens[t], g), v);
        dinput[v][t] = ddelta[v][t] = V{};
      }
    }
    for_states(N, [&](int64_t n, auto states) {
      constexpr int K = decltype(states)::value;
      T B[kChunk][K], C[kChunk][K];
      V decay[kChunk][K], h[kChunk + 1][K];
      load_projections<K>(p, block, c, n, B, C);
      for (int v = 0; v < vecs; ++v) {
        V A[K], grad[K], sum_A[K];
        for (int j = 0; j < K; ++j) {
          A[j] = block.A[(n + j) * vecs + v];
          grad[j] = carry[(n + j) * vecs + v];
          sum_A[j] = dA[(n + j) * vecs + v];
          h[0][j] = block.get(p.state(b, g, k) + (n + j) * p.D, v);
        }
        for (int64_t t = 0; t < c.length; ++t)
          for (int j = 0; j < K; ++j) {
            decay[t][j] = exp2(c.delta[v][t] * A[j]);
            h[t + 1][j] = decay[t][j] * h[t][j] + c.input[v][t] * B[t][j];
          }
        for (int64_t t = c.length - 1; t >= 0; --t) {
          V to_input = dinput[v][t], to_delta = ddelta[v][t];
          for (int j = 0; j < K; ++j) {
            V& dCn = dC.at(t, n + j);
            V& dBn = dB.at(t, n + j);
            dCn = (v ? dCn : V{}) + dy[v][t] * h[t + 1][j];
            grad[j] += dy[v][t] * C[t][j];
            dBn = (v ? dBn : V{}) + grad[j] * c.input[v][t];
            to_input += grad[j] * B[t][j];
            grad[j] *= decay[t][j];
            const V through_decay = grad[j] * h[t][j];
            to_delta += through_decay * A[j];
            sum_A[j] += through_decay * c.delta[v][t];
          }
          dinput[v][t] = to_input;
          ddelta[v][t] = to_delta;
        }
        for (int j = 0; j < K; ++j) {
          carry[(n + j) * vecs + v] = grad[j];
          dA[(n + j) * vecs + v] = sum_A[j];
        }
      }
    });
    dB.put(o.dB + rows * N, c, p.G, add);
    dC.put(o.dC + rows * N, c, p.G, add);
    for (int64_t t = 0; t < c.length; ++t)
      for (int v = 0; v < vecs; ++v) {
        const int64_t l = c.tokens[t];
        // A counts in units of log2(e)
        ddelta[v][t] = (ddelta[v][t] * T(0.6931471805599453) + dinput[v][t] * c.u[v][t]) * c.slope[v][t];
        dskip[v] += dy[v][t] * c.u[v][t];
        dbias[v] += ddelta[v][t];
        const V du = dinput[v][t] * c.delta[v][t] + block.skip[v] * dy[v][t];
        if (o.merged.data) {
          T* row = o.merged.at(b, l, 0);
          block.put(row, v, g || p.steps < p.L ? block.get(row, v) + du : du);
        } else {
          block.put(o.du.at(b, l, g), v, du);
        }
        if (!p.low_rank) block.put(o.ddt.at(b, l, g), v, ddelta[v][t]);
      }
    for (int64_t r = 0; r < R; ++r) {
      V sums[kMaxVecs];
      for (int v = 0; v < vecs; ++v) sums[v] = dweight[r * vecs + v];
      for (int64_t t = 0; t < c.length; ++t) {
        const T low = static_cast<T>(p.dt.at(b, c.tokens[t], g)[r]);
        V sum = {};
        for (int v = 0; v < vecs; ++v) {
          sum += ddelta[v][t] * block.dt_weight[r * vecs + v];
          sums[v] += ddelta[v][t] * low;
        }
        ddt.at(t, r) = sum;
      }
      for (int v = 0; v < vecs; ++v) dweight[r * vecs + v] = sums[v];
    }
    if (R) ddt.put(o.ddt_low + rows * R, c, p.G, add);
  }
  const int64_t bg = b * p.G + g;
  for (int v = 0; v < vecs; ++v) {
    for (int64_t n = 0; n < N; ++n) block.put(o.dA + (bg * N + n) * p.D, v, dA[n * vecs + v]);
    for (int64_t r = 0; r < R; ++r) block.put(o.dweight + (bg * R + r) * p.D, v, dweight[r * vecs + v]);
    if (p.skip) block.put(o.dskip + bg * p.D, v, dskip[v]);
    if (p.dt_bias) block.put(o.dbias + bg * p.D, v, dbias[v]);
  }
}

// Calls f(d0, dn) for the blocks of at most kMaxVecs vectors that make up a split of the channels.
template <class T, class F>
void for_blocks(const Sizes& s, int64_t split, F f) {
  const int64_t block =
      Simd<T>::width * (s.N > 4 ? 2 : kMaxVecs);  // many states: keep what a block holds in the L1 cache
  const int64_t end = std::min(s.D, (split + 1) * s.split_channels);
  for (int64_t d = split * s.split_channels; d < end; d += block) f(d, std::min(block, end - d));
}

template <class S, class T>
void run_forward(const Problem<S, T>& p, const Tensor& y) {
  torch::stable::parallel_for(0, p.B * (p.merge ? 1 : p.G) * p.splits, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> merged(p.merge ? p.L * p.split_channels : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.splits, bg = task / p.splits;
      if (!p.merge) {
        const Activation<S> out(y);
        for_blocks<T>(p, split, [&](int64_t d0, int64_t dn) {
          const Block<T> block(p, bg / p.G, bg % p.G, d0, dn);
          forward_block(p, block, [&](int64_t l, int v, typename Simd<T>::vec x) {
            block.put(out.at(block.batch, l, block.group), v, x);
          });
        });
        continue;
      }
      const int64_t first = split * p.split_channels, width = std::min(p.D - first, p.split_channels);
      std::fill(merged.begin(), merged.end(), T(0));
      for (int64_t g = 0; g < p.G; ++g)
        for_blocks<T>(p, split, [&](int64_t d0, int64_t dn) {
          const Block<T> block(p, bg, g, d0, dn);
          forward_block(p, block, [&](int64_t l, int v, typename Simd<T>::vec x) {
            T* row = merged.data() + l * p.split_channels - first;
            block.put(row, v, block.get(row, v) + x);
          });
        });
      S* out = static_cast<S*>(y.data_ptr()) + bg * p.L * p.D + first;
      for (int64_t l = 0; l < p.L; ++l)
        for (int64_t d = 0; d < width; ++d) out[l * p.D + d] = static_cast<S>(merged[l * p.split_channels + d]);
    }
  });
}

template <class S, class T>
void run_backward(const Problem<S, T>& p, const Gradients<S, T>& o) {
  const int64_t together = o.merged.data ? p.G : 1;  // groups of a task
  torch::stable::parallel_for(0, p.B * p.G / together * p.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % p.splits, first = task / p.splits * together;
      for (int64_t bg = first; bg < first + together; ++bg)
        for_blocks<T>(p, split, [&](int64_t d0, int64_t dn) {
          backward_block(p, o, Block<T>(p, bg / p.G, bg % p.G, d0, dn), split);
        });
    }
  });
}

template <class S, class T>
Problem<S, T> problem(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                      const std::optional<Tensor>& D, const std::optional<Tensor>& dt_weight,
                      const std::optional<Tensor>& dt_bias, bool softplus, const std::optional<Tensor>& order,
                      bool merge, int64_t split_channels, const Tensor& states) {
  Problem<S, T> p;
  p.B = u.size(0), p.L = u.size(1), p.G = u.size(2), p.D = u.size(3), p.N = A.size(1);
  p.low_rank = dt_weight.has_value();
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
  p.order = tokens_of(order, p.L);
  p.order_batch = order && order->dim() == 3 ? p.G * p.steps : 0;
  p.states = states.numel() ? static_cast<T*>(states.data_ptr()) : nullptr;
  return p;
}

void forward(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
             std::optional<Tensor> dt_weight, std::optional<Tensor> dt_bias, bool softplus, std::optional<Tensor> order,
             bool merge, int64_t split_channels, Tensor y, Tensor states) {
  dispatch(u, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_forward(problem<S, T>(u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, merge, split_channels, states),
                y);
  });
}

void backward(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
              std::optional<Tensor> dt_weight, std::optional<Tensor> dt_bias, bool softplus,
              std::optional<Tensor> order, int64_t split_channels, Tensor states, Tensor du, Tensor ddt, Tensor dA,
              Tensor dB, Tensor dC, Tensor dskip, Tensor dweight, Tensor dbias) {
  dispatch(u, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    auto data = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
    Gradients<S, T> o;
    o.dy = Activation<const S>(dy);
    if (du.size(2) < u.size(2)) o.merged = Activation<T>(du);
    else o.du = Activation<S>(du);
    if (dt_weight) o.ddt_low = data(ddt);
    else o.ddt = Activation<S>(ddt);
    o.dA = data(dA), o.dB = data(dB), o.dC = data(dC);
    o.dskip = data(dskip), o.dweight = data(dweight), o.dbias = data(dbias);
    run_backward(problem<S, T>(u, dt, A, B, C, D, dt_weight, dt_bias, softplus, order, false, split_channels, states),
                 o);
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def(
      "selective_scan_forward(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, "
      "Tensor? dt_bias, bool softplus, Tensor? order, bool merge, int split_channels, Tensor(a!) y, Tensor(b!) states) "
      "-> ()");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? dt_weight, Tensor? dt_bias, bool softplus, Tensor? order, int split_channels, Tensor states, Tensor(a!) "
      "du, "
      "Tensor(b!) ddt, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!) dD, Tensor(g!) ddt_weight, "
      "Tensor(h!) ddt_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&linzoo::forward));
  m.impl("selective_scan_backward", TORCH_BOX(&linzoo::backward));
}
