// States that are matrices and decay by one number a step, forward and backward. Tasks follow from the problem's shape
// alone and every sum has a fixed order: results do not depend on the number of threads. Activations come in the
// state's dtype, with any strides but the last, which is 1.
//
// With d = exp(g), a step writes u under the key k:
//
//   u = beta v        S <- d S + k u^T        y = S^T q
//
// and with kDelta it corrects what the decayed state holds under the key (the gated delta rule):
//
//   e = S^T k        u = beta (v - d e)
//
// One pass over the state writes it, and reads both this step's y and the next one's e.
#pragma once

#include "matrix_state.h"

namespace linzoo {
namespace {

constexpr int kTogether = 8, kAhead = 16;

template <class T>
struct Problem {
  int64_t B, L, H, N, P, chunks;
  Activation<const T> q, k, v;
  const T *g, *beta, *initial;  // (B, L, H); (B, H, N, P)
  T* states;                    // (B, H, chunk, N, P)
  Problem(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& beta_,
          const std::optional<Tensor>& initial_, const Tensor& states_)
      : B(v_.size(0)),
        L(v_.size(1)),
        H(v_.size(2)),
        N(k_.size(3)),
        P(v_.size(3)),
        chunks((L + kChunk - 1) / kChunk),
        q(q_),
        k(k_),
        v(v_),
        g(data<T>(g_)),
        beta(data<T>(beta_)),
        initial(initial_ ? data<T>(*initial_) : nullptr),
        states(states_.numel() ? data<T>(states_) : nullptr) {}
};

// A head of a batch item.
template <class T>
struct Head {
  const Problem<T>& p;
  int64_t b, h, index;
  Head(const Problem<T>& p, int64_t i) : p(p), b(i / p.H), h(i % p.H), index(i) {}
  const T* row(const Activation<const T>& x, int64_t t) const { return x.at(b, t, h); }
  int64_t scalar(int64_t t) const { return (b * p.L + t) * p.H + h; }
  T decay(int64_t t) const { return std::exp(p.g[scalar(t)]); }
  T rate(int64_t t) const { return p.beta[scalar(t)]; }
  // Asks for a step's rows, to be used kAhead steps later: no hardware prefetcher follows the rows of one head.
  void prefetch(int64_t t) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (t < 0 || t >= p.L) return;
    for (int64_t n = 0; n < p.N; n += kLine) __builtin_prefetch(row(p.q, t) + n), __builtin_prefetch(row(p.k, t) + n);
    for (int64_t n = 0; n < p.P; n += kLine) __builtin_prefetch(row(p.v, t) + n);
  }
  const T* first_state() const { return p.initial ? p.initial + index * p.N * p.P : nullptr; }
  T* state(int64_t chunk) const { return p.states + (index * p.chunks + chunk) * p.N * p.P; }
  // A row of a contiguous (batch, L, head, size) tensor, and of (batch, L + N, head, P), where states lie behind the
  // steps.
  T* out(T* x, int64_t t, int64_t size) const { return x + ((b * p.L + t) * p.H + h) * size; }
  int64_t packed(int64_t t) const { return ((b * (p.L + p.N) + t) * p.H + h) * p.P; }
};

// Steps `start` to `end` of `count` columns, K vectors, with their state S.
template <bool kDelta, int K, class T>
void forward_columns(const Head<T>& head, int64_t start, int64_t end, int64_t first, int64_t count, Wide<T, K>* S,
                     T* packed) {
  using Row = Wide<T, K>;
  const Problem<T>& p = head.p;
  const int64_t N = p.N;
  RowSum<T, K> read;
  for (int64_t n = 0; n < N; ++n) {
    if (p.states) S[n].put(head.state(start / kChunk) + n * p.P + first, count);
    if (kDelta) read.add(0, S[n], head.row(p.k, start)[n]);
  }
  for (int64_t t = start; t < end; ++t) {
    head.prefetch(t + kAhead);
    const T *q = head.row(p.q, t), *k = head.row(p.k, t), *next = head.row(p.k, std::min(t + 1, end - 1));
    const T decay = head.decay(t);
    Row u(head.row(p.v, t) + first, count);
    if (kDelta) u.add(read.total(), -decay);
    u = u * head.rate(t);
    RowSum<T, K> y;
    read = {};
    for_rows(N, [&](int64_t n, int way) {
      const Row after = (S[n] * decay).add(u, k[n]);
      y.add(way, after, q[n]);
      if (kDelta) read.add(way, after, next[n]);
      S[n] = after;
    });
    y.total().put(packed + head.packed(t) + first, count);
  }
}

template <class T>
struct Gradients {
  const T* packed;
  T *q, *k, *v, *g, *beta, *initial;
};

// The gradients of `count` columns, K vectors, which add to those of the columns before them. With z = G^T k, G the
// gradient of the state behind a step:
//
//   dv = beta z     dbeta = z . (v - d e)     de = -beta d z     dk = G u + S de     dd = G . S - beta z . e
template <bool kDelta, int K, class T>
void backward_columns(const Head<T>& head, const Gradients<T>& o, int64_t first, int64_t count) {
  using V = typename Simd<T>::vec;
  using Row = Wide<T, K>;
  constexpr int W = Simd<T>::width;
  const Problem<T>& p = head.p;
  const int64_t N = p.N, P = p.P, padded = (N + W - 1) / W * W;
  std::vector<Row> states((kChunk + 1) * N), gradient(N);
  std::vector<V> products(2 * padded + W, V{});
  std::vector<T> sums(2 * padded + W);
  Row read[kChunk], written[kChunk];
  Row* G = gradient.data();
  V *dq = products.data(), *dk = dq + padded, *scalars = dk + padded;
  auto put = [&](T* row, int64_t size, const T* sum) {
    for (int64_t n = 0; n < size; ++n) row[n] = first ? row[n] + sum[n] : sum[n];
  };
  for (int64_t n = 0; n < N; ++n) G[n] = Row(o.packed + head.packed(p.L + n) + first, count);
  for (int64_t chunk = p.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, length = std::min<int64_t>(kChunk, p.L - start);
    for (int64_t n = 0; n < N; ++n) states[n] = Row(head.state(chunk) + n * P + first, count);
    for (int64_t i = 0; i < length; ++i) {  // the states before each step, and the last one's after it
      const int64_t t = start + i;
      head.prefetch(t - kChunk);
      const T* k = head.row(p.k, t);
      const T decay = head.decay(t);
      const Row* before = states.data() + i * N;
      Row* after = states.data() + (i + 1) * N;
      written[i] = Row(head.row(p.v, t) + first, count);
      if (kDelta) {
        RowSum<T, K> e;
        for_rows(N, [&](int64_t n, int way) { e.add(way, before[n], k[n]); });
        read[i] = e.total();
        written[i].add(read[i], -decay);
      }
      written[i] = written[i] * head.rate(t);
      for (int64_t n = 0; n < N; ++n) after[n] = (before[n] * decay).add(written[i], k[n]);
    }
    for (int64_t i = length - 1; i >= 0; --i) {
      const int64_t t = start + i;
      const T *q = head.row(p.q, t), *k = head.row(p.k, t);
      const T decay = head.decay(t), rate = head.rate(t);
      const Row dy(o.packed + head.packed(t) + first, count), v(head.row(p.v, t) + first, count);
      const Row* before = states.data() + i * N;
      RowSum<T, K> sum;
      for_rows(N, [&](int64_t n, int way) {
        dq[n] = before[N + n].dot(dy);
        G[n].add(dy, q[n]);
        dk[n] = G[n].dot(written[i]);
        sum.add(way, G[n], k[n]);
      });
      const Row z = sum.total(), de = z * (-rate * decay);
      V kept[4] = {};
      for_rows(N, [&](int64_t n, int way) {
        kept[way] += G[n].dot(before[n]);
        G[n] = G[n] * decay;
        if (kDelta) dk[n] += before[n].dot(de), G[n].add(de, k[n]);
      });
      scalars[0] = (kept[0] + kept[1]) + (kept[2] + kept[3]);
      if (kDelta) scalars[0] -= z.dot(read[i]) * rate;
      scalars[0] *= decay;
      scalars[1] = z.dot(kDelta ? Row(v).add(read[i], -decay) : v);
      (z * rate).put(head.out(o.v, t, P) + first, count);
      sum_lanes<T>(products.data(), 2 * padded + W, sums.data());
      put(head.out(o.q, t, N), N, sums.data());
      put(head.out(o.k, t, N), N, sums.data() + padded);
      put(o.g + head.scalar(t), 1, sums.data() + 2 * padded);
      put(o.beta + head.scalar(t), 1, sums.data() + 2 * padded + 1);
    }
  }
  if (o.initial)
    for (int64_t n = 0; n < N; ++n) G[n].put(o.initial + (head.index * N + n) * P + first, count);
}

// f(first, count, K) for blocks of K vectors of columns: four at once as far as they go.
template <class T, class F>
void for_columns(int64_t left, int64_t right, F f) {
  constexpr int64_t W = Simd<T>::width;
  for (int64_t first = left; first < right; first += 4 * W) {
    const int64_t count = std::min(right - first, 4 * W);
    if (count <= W) f(first, count, std::integral_constant<int, 1>{});
    else if (count <= 2 * W) f(first, count, std::integral_constant<int, 2>{});
    else if (count <= 3 * W) f(first, count, std::integral_constant<int, 3>{});
    else f(first, count, std::integral_constant<int, 4>{});
  }
}

// Where there are few heads, a task is half of one's columns: by the problem's shape alone. A thread takes a few tasks
// chunk by chunk together, since the rows of a batch item's heads lie side by side.
template <bool kDelta>
void forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, std::optional<Tensor> initial, Tensor packed,
             Tensor states) {
  dispatch_states(k, [&](auto type) {
    using T = decltype(type);
    constexpr int W = Simd<T>::width;
    const Problem<T> p(q, k, v, g, beta, initial, states);
    T* out = data<T>(packed);
    const int64_t blocks = (p.P + W - 1) / W, splits = p.B * p.H < kFewHeads && blocks > 1 ? 2 : 1;
    const int64_t width = (blocks + splits - 1) / splits, held = (width + 3) / 4 * 4 * p.N;
    torch::stable::parallel_for(0, p.B * p.H * splits, 1, [&](int64_t begin, int64_t end) {
      std::vector<Wide<T, 1>> all(std::min<int64_t>(kTogether, end - begin) * held);
      for (int64_t group = begin; group < end; group += kTogether) {
        // f(head, first, count, S) for all columns of the group's tasks.
        auto for_group = [&](auto f) {
          for (int64_t task = group; task < std::min(group + kTogether, end); ++task) {
            const Head<T> head(p, task / splits);
            const int64_t left = task % splits * width * W;
            for_columns<T>(left, std::min(p.P, left + width * W), [&](int64_t first, int64_t count, auto K) {
              Wide<T, 1>* S = all.data() + (task - group) * held + (first - left) / W * p.N;
              f(head, first, count, reinterpret_cast<Wide<T, K>*>(S));
            });
          }
        };
        for_group([&](const Head<T>& head, int64_t first, int64_t count, auto* S) {
          using Row = std::remove_reference_t<decltype(*S)>;
          const T* row = head.first_state();
          for (int64_t n = 0; n < p.N; ++n) S[n] = row ? Row(row + n * p.P + first, count) : Row();
        });
        for (int64_t start = 0; start < p.L; start += kChunk)
          for_group([&](const Head<T>& head, int64_t first, int64_t count, auto* S) {
            forward_columns<kDelta>(head, start, std::min(start + kChunk, p.L), first, count, S, out);
          });
        for_group([&](const Head<T>& head, int64_t first, int64_t count, auto* S) {
          for (int64_t n = 0; n < p.N; ++n) S[n].put(out + head.packed(p.L + n) + first, count);
        });
      }
    });
  });
}

template <bool kDelta>
void backward(Tensor dpacked, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, std::optional<Tensor> initial,
              Tensor states, Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, std::optional<Tensor> dinitial) {
  dispatch_states(k, [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(q, k, v, g, beta, initial, states);
    const Gradients<T> o{data<T>(dpacked),
                         data<T>(dq),
                         data<T>(dk),
                         data<T>(dv),
                         data<T>(dg),
                         data<T>(dbeta),
                         dinitial ? data<T>(*dinitial) : nullptr};
    torch::stable::parallel_for(0, p.B * p.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Head<T> head(p, i);
        for_columns<T>(
            0, p.P, [&](int64_t first, int64_t count, auto K) { backward_columns<kDelta, K>(head, o, first, count); });
      }
    });
  });
}

}  // namespace
}  // namespace linzoo
