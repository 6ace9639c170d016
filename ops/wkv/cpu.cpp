// WKV on the CPU, forward and backward. Tasks follow from the problem's shape alone and every sum has a fixed order:
// results do not depend on the number of threads. Activations come in the state's dtype, with any strides but the last,
// which is 1; `order` gives the token of each step.

#include "../matrix_state.h"

namespace linzoo {
namespace {

// The token of each step: (T) or (B, T), or none for 0 .. L-1.
struct Order {
  const int32_t* tokens = nullptr;
  int64_t steps, batch = 0;
  Order(const std::optional<Tensor>& order, int64_t L) : steps(L) {
    if (!order) return;
    tokens = tokens_of(order, L);
    steps = order->size(order->dim() - 1);
    batch = order->dim() == 2 ? steps : 0;
  }
  int64_t token(int64_t b, int64_t t) const { return tokens ? tokens[b * batch + t] : t; }
};

// --- bi_wkv ---------------------------------------------------------------------------------------------------------
// Lanes are channels; a task is a vector of channels of a batch item. A scan from the end stores its state at every
// chunk; the scan from the start recomputes it within one chunk after the other and joins the two.

constexpr double kLog2e = 1.4426950408889634;

// Scaled where it is taken, not term by term: the digits of small exponents that are differences of large ones matter
// to the gradient of the decay.
template <class V>
inline V expe(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  return exp2(x * T(kLog2e));
}

// Sums over the steps on one side of a token, sum_i exp(key_i - distance_i w) (x_i, y_i), where the nearest step has
// distance 0; all over exp(peak), the largest of the weights: key `top` at distance `age`. Its exponent is computed
// anew at every step; decaying it step by step would add up one rounding error a step.
template <class T>
struct Side {
  using V = typename Simd<T>::vec;
  V x = {}, y = {}, far_x = {}, far_y = {}, top = broadcast<T>(T(-1e30)), age = {};  // far: times the distances
  V peak(V w) const { return top - age * w; }
  template <bool kFar>
  void pass(V key, V next_x, V next_y, V w) {
    const V zero = {}, one = broadcast<T>(1);
    const V older = age + T(1), gap = key - (top - older * w);
    const V smaller = expe(gap > zero ? -gap : gap);
    const V old = gap > zero ? smaller : one, fresh = gap > zero ? one : smaller;
    if (kFar) far_x = old * (far_x + x), far_y = old * (far_y + y);
    x = old * x + fresh * next_x;
    y = old * y + fresh * next_y;
    top = gap > zero ? key : top;
    age = gap > zero ? zero : older;
  }
};

template <class T>
struct Channels {  // of a task
  using V = typename Simd<T>::vec;
  int64_t batch, first;
  int lanes;
  V get(const T* row) const { return load<T>(row + first, lanes); }
  void put(T* row, V x) const { store<T>(row + first, x, lanes); }
};

template <class T, class F>
void for_channels(int64_t B, int64_t C, F f) {
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (C + W - 1) / W;
  torch::stable::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * W;
      f(Channels<T>{task / blocks, first, static_cast<int>(std::min<int64_t>(W, C - first))});
    }
  });
}

// Calls read(token, key, x, y) for what a step adds to the sums, and emit(token, past, future) for every step in turn.
// ahead(token) is called a chunk before the step is read.
template <bool kFar, class T, class V, class Ahead, class Read, class Emit>
void both_sides(const Order& order, int64_t batch, V w, Ahead ahead, Read read, Emit emit) {
  const int64_t steps = order.steps, chunks = (steps + kChunk - 1) / kChunk;
  std::vector<Side<T>> marks(chunks);
  Side<T> past, future, futures[kChunk];
  V key[kChunk], x[kChunk], y[kChunk];
  for (int64_t k = chunks - 1; k >= 0; --k) {
    marks[k] = future;
    for (int64_t t = std::min(steps, (k + 1) * kChunk) - 1; t >= k * kChunk; --t) {
      ahead(order.token(batch, std::max<int64_t>(t - kChunk, 0)));
      read(order.token(batch, t), key[0], x[0], y[0]);
      future.template pass<kFar>(key[0], x[0], y[0], w);
    }
  }
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t start = k * kChunk, count = std::min<int64_t>(kChunk, steps - start);
    future = marks[k];
    for (int64_t t = count - 1; t >= 0; --t) {
      ahead(order.token(batch, std::min(start + t + kChunk, steps - 1)));
      read(order.token(batch, start + t), key[t], x[t], y[t]);
      futures[t] = future;
      future.template pass<kFar>(key[t], x[t], y[t], w);
    }
    for (int64_t t = 0; t < count; ++t) {
      emit(order.token(batch, start + t), past, futures[t]);
      past.template pass<kFar>(key[t], x[t], y[t], w);
    }
  }
}

void bi_forward(Tensor k, Tensor v, Tensor w, Tensor u, std::optional<Tensor> order_, Tensor y, Tensor scale) {
  const Order order(order_, k.size(1));
  dispatch_states(k, [&](auto t) {
    using T = decltype(t);
    using V = typename Simd<T>::vec;
    const Activation<const T> keys(k), values(v);
    const Activation<T> out(y), scales = scale.dim() == 4 ? Activation<T>(scale) : Activation<T>();
    for_channels<T>(k.size(0), k.size(2), [&](const Channels<T>& c) {
      const int64_t b = c.batch;
      const V decay = c.get(data<T>(w)), bonus = c.get(data<T>(u));
      both_sides<false, T>(
          order, b, decay,
          [&](int64_t l) {
            __builtin_prefetch(keys.at(b, l) + c.first, 0, 2);
            __builtin_prefetch(values.at(b, l) + c.first, 0, 2);
          },
          [&](int64_t l, V& key, V& x, V& one) {
            key = c.get(keys.at(b, l));
            x = c.get(values.at(b, l));
            one = broadcast<T>(1);
          },
          [&](int64_t l, const Side<T>& past, const Side<T>& future) {
            const V own = c.get(keys.at(b, l)) + bonus;
            const V past_peak = past.peak(decay), future_peak = future.peak(decay);
            V peak = past_peak > future_peak ? past_peak : future_peak;
            peak = peak > own ? peak : own;
            const V before = expe(past_peak - peak), after = expe(future_peak - peak), self = expe(own - peak);
            const V den = before * past.y + after * future.y + self;
            const V num = before * past.x + after * future.x + self * c.get(values.at(b, l));
            c.put(out.at(b, l), num / den);
            if (!scales.rows) return;
            c.put(scales.at(b, l, 0), peak);
            c.put(scales.at(b, l, 1), den);
          });
    });
  });
}

// With p_ti the weight of token i for step t and g the upstream gradient, dv_i = sum_t p_ti g_t and
// dk_i = sum_t p_ti g_t (v_i - y_t): sums of the same kind, of g and g y over the denominators, with keys -peak.
void bi_backward(Tensor dy, Tensor k, Tensor v, Tensor w, Tensor u, std::optional<Tensor> order_, Tensor y,
                 Tensor scale, Tensor dk, Tensor dv, Tensor dw, Tensor du) {
  const Order order(order_, k.size(1));
  const int64_t C = k.size(2);
  dispatch_states(k, [&](auto t) {
    using T = decltype(t);
    using V = typename Simd<T>::vec;
    const Activation<const T> grads(dy), keys(k), values(v), outputs(y), scales(scale);
    const Activation<T> to_key(dk), to_value(dv);
    for_channels<T>(k.size(0), C, [&](const Channels<T>& c) {
      const int64_t b = c.batch;
      const V decay = c.get(data<T>(w)), bonus = c.get(data<T>(u));
      Sum<V> sum_w, sum_u;
      both_sides<true, T>(
          order, b, decay,
          [&](int64_t l) {
            for (const auto* a : {&grads, &outputs, &scales}) __builtin_prefetch(a->at(b, l) + c.first, 0, 2);
          },
          [&](int64_t l, V& key, V& g, V& gy) {
            key = -c.get(scales.at(b, l, 0));
            g = c.get(grads.at(b, l)) / c.get(scales.at(b, l, 1));
            gy = g * c.get(outputs.at(b, l));
          },
          [&](int64_t l, const Side<T>& past, const Side<T>& future) {
            const V key = c.get(keys.at(b, l)), value = c.get(values.at(b, l));
            const V g = c.get(grads.at(b, l)) / c.get(scales.at(b, l, 1)), y = c.get(outputs.at(b, l));
            const V before = expe(past.peak(decay) + key), after = expe(future.peak(decay) + key);
            const V self = expe(key + bonus - c.get(scales.at(b, l, 0))) * g;
            const V sum = before * past.x + after * future.x + self;
            c.put(to_value.at(b, l), sum);
            c.put(to_key.at(b, l), value * sum - (before * past.y + after * future.y + self * y));
            sum_w.add(before * (value * past.far_x - past.far_y) + after * (value * future.far_x - future.far_y));
            sum_u.add(self * (value - y));
          });
      c.put(data<T>(dw) + b * C, -sum_w.sum);
      c.put(data<T>(du) + b * C, sum_u.sum);
    });
  });
}

// --- wkv6 and wkv7 --------------------------------------------------------------------------------------------------
// A task is a head of a batch item, whose second direction adds to the results of the first. The state is kept as N
// rows (key channels) of lanes (value channels), whose columns do not depend on each other: the forward pass walks a
// chunk of steps with one vector of columns after the other, the backward pass with four at a time, since gradients of
// what belongs to a row sum over the columns.
//
//   d = exp(-exp(w))
//   wkv6:  y_t = r_t S_t + (r_t . u k_t) v_t,  S_{t+1} = d_t S_t + k_t v_t
//   wkv7:  S_t = d_t S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t,  y_t = r_t S_t

constexpr int64_t kTogether = 8;  // tasks that a thread takes chunk by chunk

template <class T>
struct Problem {
  int64_t B, L, H, N, P, chunks, directions;
  Order order;
  Activation<const T> r, w, k, v, a, b;
  const T* u;
  T* states;  // (direction, batch, head, chunk, N, P)
  Problem(const Tensor& r_, const Tensor& w_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& a_,
          const std::optional<Tensor>& b_, const std::optional<Tensor>& u_, const std::optional<Tensor>& order_,
          int64_t directions, const Tensor& states_)
      : B(v_.size(0)),
        L(v_.size(1)),
        H(v_.size(2)),
        N(k_.size(3)),
        P(v_.size(3)),
        directions(directions),
        order(order_, L),
        r(r_),
        w(w_),
        k(k_),
        v(v_) {
    if (a_) a = Activation<const T>(*a_), b = Activation<const T>(*b_);
    u = u_ ? data<T>(*u_) : nullptr;
    chunks = (order.steps + kChunk - 1) / kChunk;
    states = states_.numel() ? data<T>(states_) : nullptr;
  }
};

// A direction of a head of a batch item.
template <class T>
struct Head {
  const Problem<T>& p;
  int64_t direction, b, h, index;
  Head(const Problem<T>& p, int64_t direction, int64_t i)
      : p(p), direction(direction), b(i / p.H), h(i % p.H), index(direction * p.B * p.H + i) {}
  int64_t token(int64_t t) const { return p.order.token(b, direction ? p.order.steps - 1 - t : t); }
  const T* row(const Activation<const T>& x, int64_t l) const { return x.at(b, l, h); }
  const T* bonus() const { return p.u && !direction ? p.u + h * p.N : nullptr; }  // counted once
  T* state(int64_t chunk) const { return p.states + (index * p.chunks + chunk) * p.N * p.P; }
  // Sets, or adds to, the value channels from `first` on of a token's row.
  template <class Row>
  void put(Row x, T* y, int64_t l, int64_t first) const {
    T* row = out(y, l, p.P) + first;
    if (direction) x += Row(row, p.P - first);
    x.put(row, p.P - first);
  }
  // A token's row in a contiguous (batch, token, head, size) tensor.
  T* out(T* x, int64_t l, int64_t size) const { return x + ((b * p.L + l) * p.H + h) * size; }
};

// sum_n x_n y_n z_n
template <class T>
T dot(const T* x, const T* y, const T* z, int64_t N) {
  constexpr int W = Simd<T>::width;
  typename Simd<T>::vec lanes = {};
  for (int64_t n = 0; n < N; n += W) {
    const int count = static_cast<int>(std::min<int64_t>(W, N - n));
    lanes += load<T>(x + n, count) * load<T>(y + n, count) * load<T>(z + n, count);
  }
  T sum = 0;
  for (int i = 0; i < W; ++i) sum += lanes[i];
  return sum;
}

// What the steps of a chunk need of the key channels alone: the decays d and, for the backward pass, dd/dw = -exp(w) d;
// r_t . u k_t, a token's weight for itself.
template <class T>
struct Steps {
  using V = typename Simd<T>::vec;
  int64_t padded;
  std::vector<T> factors, slopes;
  T own[kChunk];
  explicit Steps(int64_t N)
      : padded((N + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width),
        factors(kChunk * padded),
        slopes(kChunk * padded) {}
  const T* factor(int64_t t) const { return factors.data() + t * padded; }
  const T* slope(int64_t t) const { return slopes.data() + t * padded; }

  // Asks for a token's rows, to be used a chunk later: no hardware prefetcher follows an order, nor a head's rows.
  static void prefetch(const Head<T>& head, int64_t l) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const Problem<T>& p = head.p;
    for (const auto* x : {&p.r, &p.k, &p.w, &p.a, &p.b})
      for (int64_t n = 0; n < p.N && x->rows; n += kLine) __builtin_prefetch(head.row(*x, l) + n, 0, 2);
    for (int64_t n = 0; n < p.P; n += kLine) __builtin_prefetch(head.row(p.v, l) + n, 0, 2);
  }

  // kSlope: for the backward pass, which takes the chunks from the last to the first.
  template <bool kSlope>
  void read(const Head<T>& head, int64_t start, int64_t length) {
    constexpr int W = Simd<T>::width;
    const Problem<T>& p = head.p;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t l = head.token(start + t), next = start + t + (kSlope ? -kChunk : kChunk);
      if (next >= 0 && next < p.order.steps) prefetch(head, head.token(next));
      const T* w = head.row(p.w, l);
      for (int64_t n = 0; n < p.N; n += W) {
        const V x = load<T>(w + n, static_cast<int>(std::min<int64_t>(W, p.N - n)));
        const V e = exp2((x > T(32) ? broadcast<T>(32) : x) * T(kLog2e));  // beyond, d is 0 in any dtype
        const V d = exp2(e * T(-kLog2e));
        store<T>(factors.data() + t * padded + n, d, W);
        if (kSlope) store<T>(slopes.data() + t * padded + n, -e * d, W);
      }
      if (head.bonus()) own[t] = dot(head.row(p.r, l), head.bonus(), head.row(p.k, l), p.N);
    }
  }
};

// sum_n row[n] S[n]
template <class T, int K>
Wide<T, K> read(const T* row, const Wide<T, K>* S, int64_t N) {
  RowSum<T, K> sum;
  for_rows(N, [&](int64_t n, int way) { sum.add(way, S[n], row[n]); });
  return sum.total();
}

// Steps `start` to `end` of a vector of columns with their state S.
template <bool kDelta, class T>
void forward_columns(const Head<T>& head, const Steps<T>& steps, int64_t start, int64_t end, int64_t first,
                     Wide<T, 1>* S, T* y) {
  using Row = Wide<T, 1>;
  const Problem<T>& p = head.p;
  const int64_t N = p.N, count = p.P - first;
  if (p.states)
    for (int64_t n = 0; n < N; ++n) S[n].put(head.state(start / kChunk) + n * p.P + first, count);
  for (int64_t t = start; t < end; ++t) {
    const int64_t l = head.token(t);
    const T *r = head.row(p.r, l), *k = head.row(p.k, l), *decay = steps.factor(t - start);
    const Row v(head.row(p.v, l) + first, count);
    RowSum<T, 1> sum;
    if (kDelta) {
      const T* b = head.row(p.b, l);
      const Row erased = read(head.row(p.a, l), S, N);
      for_rows(N, [&](int64_t n, int way) {
        const Row after = (S[n] * decay[n]).add(erased, b[n]).add(v, k[n]);
        sum.add(way, after, r[n]);
        S[n] = after;
      });
    } else {
      for_rows(N, [&](int64_t n, int way) {
        const Row before = S[n];
        sum.add(way, before, r[n]);
        S[n] = (before * decay[n]).add(v, k[n]);
      });
      if (head.bonus()) sum.add(0, v, steps.own[t - start]);
    }
    head.put(sum.total(), y, l, first);
  }
}

template <class T>
struct Gradients {
  Activation<const T> dy;
  T *r, *w, *k, *v, *a, *b, *u;  // (batch, token, head, -), and u (batch, head, N)
};

// The gradients of K vectors of columns, which add to those of the columns before them.
template <bool kDelta, int K, class T>
void backward_columns(const Head<T>& head, const Gradients<T>& o, int64_t first) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width, kSums = kDelta ? 5 : 3;
  const Problem<T>& p = head.p;
  const int64_t N = p.N, count = p.P - first, padded = (N + W - 1) / W * W;
  const T* u = head.bonus();
  T* du = u ? o.u + (head.b * p.H + head.h) * N : nullptr;
  std::vector<Wide<T, K>> states((kChunk + 1) * N), gradient(N);
  std::vector<V> products(kSums * padded, V{});
  std::vector<T> sums(kSums * padded);
  Steps<T> steps(N);
  Wide<T, K> erased[kChunk];
  Wide<T, K>* G = gradient.data();  // of the state after a step
  V* product = products.data();
  if (u && !first) std::fill(du, du + N, T(0));
  auto put = [&](T* x, int64_t l, int i) {  // product i, summed over the columns
    T* row = head.out(x, l, N);
    const bool add = first || head.direction;
    for (int64_t n = 0; n < N; ++n) row[n] = add ? row[n] + sums[i * padded + n] : sums[i * padded + n];
  };
  for (int64_t chunk = p.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, length = std::min<int64_t>(kChunk, p.order.steps - start);
    steps.template read<true>(head, start, length);
    for (int64_t n = 0; n < N; ++n) states[n] = Wide<T, K>(head.state(chunk) + n * p.P + first, count);
    for (int64_t t = 0; t < length; ++t) {  // the states before each step, and the last one's after it
      const int64_t l = head.token(start + t);
      const T *k = head.row(p.k, l), *decay = steps.factor(t);
      const Wide<T, K> v(head.row(p.v, l) + first, count);
      const Wide<T, K>* before = states.data() + t * N;
      Wide<T, K>* after = states.data() + (t + 1) * N;
      if (kDelta) {
        const T* b = head.row(p.b, l);
        erased[t] = read(head.row(p.a, l), before, N);
        for (int64_t n = 0; n < N; ++n) after[n] = (before[n] * decay[n]).add(erased[t], b[n]).add(v, k[n]);
      } else {
        for (int64_t n = 0; n < N; ++n) after[n] = (before[n] * decay[n]).add(v, k[n]);
      }
    }
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t l = head.token(start + t);
      const T *r = head.row(p.r, l), *k = head.row(p.k, l), *decay = steps.factor(t);
      const Wide<T, K> v(head.row(p.v, l) + first, count), g(o.dy.at(head.b, l, head.h) + first, count);
      const Wide<T, K>* before = states.data() + t * N;
      RowSum<T, K> dv;
      if (kDelta) {
        const T *a = head.row(p.a, l), *b = head.row(p.b, l);
        RowSum<T, K> sum;
        for_rows(N, [&](int64_t n, int way) {
          product[n] = before[N + n].dot(g);
          G[n].add(g, r[n]);
          sum.add(way, G[n], b[n]);
        });
        const Wide<T, K> to_erased = sum.total();
        for_rows(N, [&](int64_t n, int way) {
          product[padded + n] = G[n].dot(before[n]);
          product[2 * padded + n] = G[n].dot(v);
          product[3 * padded + n] = before[n].dot(to_erased);
          product[4 * padded + n] = G[n].dot(erased[t]);
          dv.add(way, G[n], k[n]);
          G[n] = (G[n] * decay[n]).add(to_erased, a[n]);
        });
      } else {
        for_rows(N, [&](int64_t n, int way) {
          product[n] = before[n].dot(g);
          product[padded + n] = G[n].dot(before[n]);
          product[2 * padded + n] = G[n].dot(v);
          dv.add(way, G[n], k[n]);
          G[n] = (G[n] * decay[n]).add(g, r[n]);
        });
        if (u) dv.add(0, g, steps.own[t]);
      }
      head.put(dv.total(), o.v, l, first);
      sum_lanes<T>(product, kSums * padded, sums.data());
      if (u) {
        const V lanes = v.dot(g);
        T vg = 0;
        for (int i = 0; i < W; ++i) vg += lanes[i];
        for (int64_t n = 0; n < N; ++n) {
          sums[n] += u[n] * k[n] * vg;
          sums[2 * padded + n] += u[n] * r[n] * vg;
          du[n] += r[n] * k[n] * vg;
        }
      }
      for (int64_t n = 0; n < N; ++n) sums[padded + n] *= steps.slope(t)[n];
      put(o.r, l, 0);
      put(o.w, l, 1);
      put(o.k, l, 2);
      if (kDelta) put(o.a, l, 3), put(o.b, l, 4);
    }
  }
}

// Where there are few heads, a task is half of one's columns: by the problem's shape alone. A thread takes a few tasks
// chunk by chunk together, since the rows of a batch item's heads lie side by side.
template <bool kDelta, class T>
void run_forward(const Problem<T>& p, T* y) {
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (p.P + W - 1) / W, splits = p.B * p.H < kFewHeads && blocks > 1 ? 2 : 1;
  const int64_t width = (blocks + splits - 1) / splits * W;
  torch::stable::parallel_for(0, p.B * p.H * splits, 1, [&](int64_t begin, int64_t end) {
    Steps<T> steps(p.N);
    const int64_t held = width / W * p.N;
    for (int64_t group = begin; group < end; group += kTogether)
      for (int64_t direction = 0; direction < p.directions; ++direction) {
        std::vector<Wide<T, 1>> states(std::min(kTogether, end - group) * held);
        for (int64_t start = 0; start < p.order.steps; start += kChunk) {
          const int64_t length = std::min<int64_t>(kChunk, p.order.steps - start);
          for (int64_t task = group; task < std::min(group + kTogether, end); ++task) {
            const Head<T> head(p, direction, task / splits);
            const int64_t left = task % splits * width, right = std::min(p.P, left + width);
            if (task == group || left == 0) steps.template read<false>(head, start, length);
            for (int64_t first = left; first < right; first += W) {
              Wide<T, 1>* S = states.data() + (task - group) * held + (first - left) / W * p.N;
              forward_columns<kDelta>(head, steps, start, start + length, first, S, y);
            }
          }
        }
      }
  });
}

template <bool kDelta, class T>
void run_backward(const Problem<T>& p, const Gradients<T>& o) {
  torch::stable::parallel_for(0, p.B * p.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.directions; i < end * p.directions; ++i) {
      const Head<T> head(p, i % p.directions, i / p.directions);
      for (int64_t first = 0; first < p.P; first += 4 * Simd<T>::width) {
        if (p.P - first <= Simd<T>::width) backward_columns<kDelta, 1>(head, o, first);
        else backward_columns<kDelta, 4>(head, o, first);
      }
    }
  });
}

void matrix_forward(Tensor r, Tensor w, Tensor k, Tensor v, std::optional<Tensor> a, std::optional<Tensor> b,
                    std::optional<Tensor> u, std::optional<Tensor> order, int64_t directions, Tensor y, Tensor states) {
  dispatch_states(k, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p(r, w, k, v, a, b, u, order, directions, states);
    if (a) run_forward<true>(p, data<T>(y));
    else run_forward<false>(p, data<T>(y));
  });
}

void matrix_backward(Tensor dy, Tensor r, Tensor w, Tensor k, Tensor v, std::optional<Tensor> a,
                     std::optional<Tensor> b, std::optional<Tensor> u, std::optional<Tensor> order, int64_t directions,
                     Tensor states, Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor du) {
  dispatch_states(k, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p(r, w, k, v, a, b, u, order, directions, states);
    const Gradients<T> o{Activation<const T>(dy),
                         data<T>(dr),
                         data<T>(dw),
                         data<T>(dk),
                         data<T>(dv),
                         data<T>(da),
                         data<T>(db),
                         data<T>(du)};
    if (a) run_backward<true>(p, o);
    else run_backward<false>(p, o);
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def("bi_wkv_forward(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, Tensor(a!) y, Tensor(b!) scale) -> ()");
  m.def(
      "bi_wkv_backward(Tensor dy, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? order, Tensor y, Tensor scale, "
      "Tensor(a!) dk, Tensor(b!) dv, Tensor(c!) dw, Tensor(d!) du) -> ()");
  m.def(
      "wkv_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? u, Tensor? order, "
      "int directions, Tensor(a!) y, Tensor(b!) states) -> ()");
  m.def(
      "wkv_backward(Tensor dy, Tensor r, Tensor w, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? u, Tensor? order, "
      "int directions, Tensor states, Tensor(a!) dr, Tensor(b!) dw, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!) da, "
      "Tensor(f!) db, Tensor(g!) du) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("bi_wkv_forward", TORCH_BOX(&linzoo::bi_forward));
  m.impl("bi_wkv_backward", TORCH_BOX(&linzoo::bi_backward));
  m.impl("wkv_forward", TORCH_BOX(&linzoo::matrix_forward));
  m.impl("wkv_backward", TORCH_BOX(&linzoo::matrix_backward));
}
