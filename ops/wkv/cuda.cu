// WKV on CUDA, forward and backward.
//
// bi_wkv: a thread is a channel of a batch item and a segment of its steps. `bi_ends` sums each segment as seen from
// its end and from its start, `bi_carry` joins the segments from both sides, and `bi_sweep` walks each between the two.
// As on the CPU the exponent of a sum is computed anew at every step, of its largest key and its distance; exponents
// are in base 2.
//
// wkv6, wkv7: a block is a direction of a head of a batch item. Four threads hold four columns of the state (value
// channels), each a quarter of its rows (key channels), in registers. `forward6` and `backward6`, `forward7` and
// `backward7` are wkv6 and wkv7 on tensor cores, 16 steps at a time.

#include "device.cuh"

constexpr int kChunk = LINZOO_CHUNK;
constexpr int kCarried = 4;           // segments whose ends a thread that joins them reads at once
constexpr int kMarks = LINZOO_MARKS;  // chunks of a segment of bi_wkv, at most
constexpr double kLog2e = 1.4426950408889634;

// --- bi_wkv ---------------------------------------------------------------------------------------------------------

// Scaled where it is taken, not term by term: the digits of small exponents that are differences of large ones matter
// to the gradient of the decay.
template <class T>
__device__ __forceinline__ T expe(T x) {
  return exp2_(x * T(kLog2e));
}

// Sums over steps at a distance, sum_i exp(key_i - distance_i w) (x_i, y_i), over exp(peak), the largest of the
// weights: key `top` at distance `age`. `far`: the same sums, each term times its distance.
template <class T, bool kFar>
struct Sums {
  T x = 0, y = 0, far_x = 0, far_y = 0, top = T(-1e30), age = 0;
  static constexpr int kFields = kFar ? 6 : 4;

  __device__ __forceinline__ T peak(T w) const { return top - age * w; }
  __device__ __forceinline__ void move(T distance) {
    if (kFar) far_x += distance * x, far_y += distance * y;
    age += distance;
  }
  __device__ __forceinline__ void join(const Sums& o, T w) {
    const T gap = o.peak(w) - peak(w), less = expe(gap > T(0) ? -gap : gap);
    const T old = gap > T(0) ? less : T(1), fresh = gap > T(0) ? T(1) : less;
    x = old * x + fresh * o.x;
    y = old * y + fresh * o.y;
    if (kFar) far_x = old * far_x + fresh * o.far_x, far_y = old * far_y + fresh * o.far_y;
    if (gap > T(0)) top = o.top, age = o.age;
  }
  __device__ __forceinline__ void add(T key, T next_x, T next_y, T distance, T w) {
    join(Sums{next_x, next_y, distance * next_x, distance * next_y, key, distance}, w);
  }
  // Everything moves one step away, and a step follows at distance 0.
  __device__ __forceinline__ void pass(T key, T next_x, T next_y, T w) {
    move(T(1));
    add(key, next_x, next_y, T(0), w);
  }
  // Fields lie `stride` apart.
  __device__ __forceinline__ void store(T* p, i64 stride) const {
    p[0] = x, p[stride] = y, p[2 * stride] = top, p[3 * stride] = age;
    if (kFar) p[4 * stride] = far_x, p[5 * stride] = far_y;
  }
  __device__ __forceinline__ void load(const T* p, i64 stride) {
    x = p[0], y = p[stride], top = p[2 * stride], age = p[3 * stride];
    if (kFar) far_x = p[4 * stride], far_y = p[5 * stride];
  }
};

// What a step adds: forward (its key, v, 1), backward (-peak, dy / den, dy y / den); of a batch item's channel.
template <class T, bool kBackward>
struct Terms {
  Tokens<const T> first, second, y;  // k, v or scale (peak, and den C behind it), dy, y
  i64 C;
  // Of `count` steps from `start` on, all of them read before the first is used.
  __device__ __forceinline__ void read_chunk(const Order& order, const Place& p, i64 start, int count,
                                             T (&keys)[kChunk], T (&xs)[kChunk], T (&others)[kChunk]) const {
    Pack<T, 1> key[kChunk], x[kChunk], den[kChunk], out[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int token = static_cast<int>(order.token(p.b, 0, start + smaller(i, count - 1)));
      key[i] = read<1>(first.at(token));
      x[i] = read<1>(second.at(token));
      if (kBackward) den[i] = read<1>(first.at(token) + C), out[i] = read<1>(y.at(token));
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      keys[i] = kBackward ? -key[i].x[0] : key[i].x[0];
      xs[i] = kBackward ? x[i].x[0] * reciprocal(den[i].x[0]) : x[i].x[0];
      others[i] = kBackward ? xs[i] * out[i].x[0] : T(1);
    }
  }
};

// ends: (2 sides, B, segments, fields, C).
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    bi_ends(const T* first_, i64 first_batch, i64 first_token, const T* second_, i64 second_batch, i64 second_token,
            const T* y, const int* order_, i64 order_batch, const T* w, i64 B, i64 L, i64 C, i64 steps, i64 blocks,
            i64 segments, i64 segment_steps, T* ends) {
  const Place p(1, C, steps, blocks, segments, segment_steps);
  if (!p.active) return;
  const Order order{order_, order_batch, steps};
  const Terms<T, kBackward> terms{{first_, p.b * first_batch + p.c, first_token},
                                  {second_, p.b * second_batch + p.c, second_token},
                                  {y, p.b * L * C + p.c, C},
                                  C};
  const T decay = w[p.c];
  Sums<T, kBackward> past, future;
  for (i64 start = p.begin; start < p.end; start += kChunk) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    T keys[kChunk], xs[kChunk], others[kChunk];
    terms.read_chunk(order, p, start, count, keys, xs, others);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      past.pass(keys[i], xs[i], others[i], decay);
      future.add(keys[i], xs[i], others[i], T(start + i - p.begin), decay);
    }
  }
  const i64 side = B * segments * Sums<T, kBackward>::kFields * C;
  T* at = ends + p.index * Sums<T, kBackward>::kFields * C + p.c;
  past.store(at, C);
  future.store(at + side, C);
}

// `ends` becomes what a segment has before its first step (side 0) and behind its last (side 1).
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    bi_carry(T* ends, const T* w, i64 B, i64 C, i64 steps, i64 segments, i64 segment_steps) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= 2 * B * C) return;
  const i64 c = i % C, sb = i / C;
  const bool backwards = sb >= B;
  const T decay = w[c];
  Sums<T, kBackward> sums;
  for (i64 first = 0; first < segments; first += kCarried) {
    Sums<T, kBackward> own[kCarried];
    const auto segment = [&](i64 k) { return backwards ? segments - 1 - k : k; };
    const auto at = [&](i64 k) { return ends + (sb * segments + segment(k)) * Sums<T, kBackward>::kFields * C + c; };
#pragma unroll
    for (int i = 0; i < kCarried; ++i) own[i].load(at(smaller(first + i, segments - 1)), C);
#pragma unroll
    for (int i = 0; i < kCarried; ++i) {
      if (first + i >= segments) break;
      sums.store(at(first + i), C);
      sums.move(T(smaller(segment_steps, steps - segment(first + i) * segment_steps)));
      sums.join(own[i], decay);
    }
  }
}

// dw, du: (B, segments, C).
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    bi_sweep(const T* k_, i64 k_batch, i64 k_token, const T* v_, i64 v_batch, i64 v_token, const T* dy_, i64 dy_batch,
             i64 dy_token, const int* order_, i64 order_batch, const T* w, const T* u, i64 B, i64 L, i64 C, i64 steps,
             i64 blocks, i64 segments, i64 segment_steps, const T* ends, T* y_, T* scale, T* dk, T* dv, T* dw, T* du) {
  using Side = Sums<T, kBackward>;
  __shared__ T marks[kMarks][Side::kFields][kThreads];
  const Place p(1, C, steps, blocks, segments, segment_steps);
  if (!p.active) return;
  const Order order{order_, order_batch, steps};
  const Tokens<const T> k(k_, p.b * k_batch + p.c, k_token), v(v_, p.b * v_batch + p.c, v_token);
  const Tokens<const T> dy(dy_, p.b * dy_batch + p.c, dy_token), scales(scale, p.b * 2 * L * C + p.c, 2 * C);
  const Tokens<const T> out(y_, p.b * L * C + p.c, C);
  const Terms<T, kBackward> terms{kBackward ? scales : k, kBackward ? dy : v, out, C};
  const T decay = w[p.c], bonus = u[p.c];
  const i64 side = B * segments * Side::kFields * C;
  const int chunks = static_cast<int>((p.end - p.begin + kChunk - 1) / kChunk);
  Side past, future;
  if (ends) {
    const T* at = ends + p.index * Side::kFields * C + p.c;
    past.load(at, C);
    future.load(at + side, C);
  }
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    future.store(&marks[chunk][0][threadIdx.x], kThreads);
    if (chunk == 0) break;
    const i64 start = p.begin + chunk * kChunk;
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    T keys[kChunk], xs[kChunk], others[kChunk];
    terms.read_chunk(order, p, start, count, keys, xs, others);
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      if (i < count) future.pass(keys[i], xs[i], others[i], decay);
    }
  }
  Sum<T> sum_w, sum_u;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const i64 start = p.begin + chunk * kChunk;
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    T keys[kChunk], xs[kChunk], others[kChunk];
    Side futures[kChunk];
    future.load(&marks[chunk][0][threadIdx.x], kThreads);
    terms.read_chunk(order, p, start, count, keys, xs, others);
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      if (i >= count) continue;
      futures[i] = future;
      future.pass(keys[i], xs[i], others[i], decay);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      const i64 l = order.token(p.b, 0, start + i), at = (p.b * L + l) * C + p.c;
      if (!kBackward) {
        const T own = keys[i] + bonus, before = past.peak(decay), after = futures[i].peak(decay);
        const T peak = larger(own, larger(before, after));
        const T left = expe(before - peak), right = expe(after - peak), self = expe(own - peak);
        const T den = left * past.y + right * futures[i].y + self;
        y_[at] = (left * past.x + right * futures[i].x + self * xs[i]) * reciprocal(den);
        if (scale) scale[at + (p.b * L + l) * C] = peak, scale[at + (p.b * L + l + 1) * C] = den;
      } else {
        const T key = read<1>(k.at(static_cast<int>(l))).x[0], value = read<1>(v.at(static_cast<int>(l))).x[0];
        const T left = expe(past.peak(decay) + key), right = expe(futures[i].peak(decay) + key);
        const T self = expe(key + bonus + keys[i]) * xs[i];
        const T sum = left * past.x + right * futures[i].x + self;
        const T minus = left * past.y + right * futures[i].y + self * y_[at];
        dv[at] = sum;
        dk[at] = value * sum - minus;
        sum_w.add(left * (value * past.far_x - past.far_y) + right * (value * futures[i].far_x - futures[i].far_y));
        sum_u.add(self * (value - y_[at]));
      }
      past.pass(keys[i], xs[i], others[i], decay);
    }
  }
  if (!kBackward) return;
  const i64 at = p.index * C + p.c;
  dw[at] = -sum_w.sum;
  du[at] = sum_u.sum;
}

// --- wkv6 and wkv7 --------------------------------------------------------------------------------------------------
//
//   d = exp(-exp(w))
//   wkv6:  y_t = r_t S_t + (r_t . u k_t) v_t,  S_{t+1} = d_t S_t + k_t v_t
//   wkv7:  S_t = d_t S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t,  y_t = r_t S_t

// A direction of a head of a batch item; rows are (batch, token, head) with N or P channels.
struct Head {
  i64 direction, b, h, index, steps;
  Order order;
  __device__ __forceinline__ Head(i64 task, i64 B, i64 H, const Order& order)
      : index(task), steps(order.steps), order(order) {
    h = task % H;
    b = task / H % B;
    direction = task / (H * B);
  }
  __device__ __forceinline__ i64 token(i64 t) const { return order.token(b, 0, direction ? steps - 1 - t : t); }
};

constexpr int kQuad = 4;  // columns of a thread, and threads that share a column

// The part of a state, N rows by `kThreads` columns, that a thread holds: four columns, and of each sixteen rows four.
template <int N>
struct Tile {
  static constexpr int kGroups = (N + 15) / 16, kRows = kQuad * kGroups, kPadded = 16 * kGroups;
  int part = threadIdx.x % kQuad, column = threadIdx.x / kQuad * kQuad;
  __device__ __forceinline__ int row(int i) const { return i / kQuad * 16 + part * kQuad + i % kQuad; }
  // A thread's rows of a vector in shared memory.
  template <class T>
  __device__ __forceinline__ void rows(T (&out)[kRows], const T* vector) const {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      load(reinterpret_cast<T(&)[kQuad]>(out[m * kQuad]), vector + m * 16 + part * kQuad);
    }
  }
  template <class T>
  __device__ __forceinline__ void load_state(T (&S)[kRows][kQuad], const T* at, i64 P) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int q = 0; q < kQuad; ++q) S[i][q] = row(i) < N && column + q < P ? at[row(i) * P + column + q] : T(0);
    }
  }
  template <class T>
  __device__ __forceinline__ void store_state(const T (&S)[kRows][kQuad], T* at, i64 P) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int q = 0; q < kQuad; ++q) {
        if (row(i) < N && column + q < P) at[row(i) * P + column + q] = S[i][q];
      }
    }
  }
  // Of `history`, whose rows and columns are all there: four columns in one access.
  template <class T>
  __device__ __forceinline__ void remember(const T (&S)[kRows][kQuad], T* history) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) ::write(history + row(i) * blockDim.x + column, S[i]);
  }
  template <class T>
  __device__ __forceinline__ void recall(T (&S)[kRows][kQuad], const T* history) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) unpack(S[i], read<kQuad>(history + row(i) * blockDim.x + column));
  }
  // `out` = sum over rows of vector times state, for every column, to all of the four threads.
  template <class T>
  __device__ __forceinline__ void columns(T (&out)[kQuad], const T (&vector)[kRows], const T (&S)[kRows][kQuad]) const {
#pragma unroll
    for (int q = 0; q < kQuad; ++q) {
      out[q] = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) out[q] += vector[i] * S[i][q];
      out[q] += __shfl_xor_sync(0xffffffffu, out[q], 1);
      out[q] += __shfl_xor_sync(0xffffffffu, out[q], 2);
    }
  }
};

// The four columns' sums over four threads; a thread gets that of its own column, number threadIdx.x.
template <class T>
__device__ __forceinline__ T own_column(const T (&x)[kQuad]) {
  return warp_sums<kQuad, 2>(x);
}

// The sums of rows' values over the eight threads of a warp that hold the same rows, to `out`, a vector of the warp.
template <int N, class T>
__device__ __forceinline__ void sum_rows(T* out, const T (&x)[Tile<N>::kRows], const Tile<N>& tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Tile<N>::kGroups; ++m) {
    T two[2], one;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T sent = lane & 16 ? x[m * kQuad + i] : x[m * kQuad + i + 2];
      const T stays = lane & 16 ? x[m * kQuad + i + 2] : x[m * kQuad + i];
      two[i] = stays + __shfl_xor_sync(0xffffffffu, sent, 16);
    }
    const T sent = lane & 8 ? two[0] : two[1], stays = lane & 8 ? two[1] : two[0];
    one = stays + __shfl_xor_sync(0xffffffffu, sent, 8);
    one += __shfl_xor_sync(0xffffffffu, one, 4);
    if (!(lane & 4)) out[m * 16 + tile.part * kQuad + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0)] = one;
  }
}

// Rows of `width` values of the steps [start, start + count) into shared memory, 0 behind them and in other columns.
template <int K, class T>
__device__ __forceinline__ void stage(T (*out)[K], const Rows<const T>& rows, const Head& head, i64 start, int count,
                                      i64 width) {
  for (int i = threadIdx.x; i < count * K; i += blockDim.x) {
    out[i / K][i % K] = i % K < width ? *(rows.at(head.b, head.token(start + i / K), head.h) + i % K) : T(0);
  }
}

// Beyond 32 the decay is 0 in any dtype, and so is its derivative.
template <class T>
__device__ __forceinline__ T decay_of(T w) {
  return exp_(-exp_(smaller(w, T(32))));
}

__device__ __forceinline__ float power_of(float w) { return exp2_(static_cast<float>(kLog2e) * smaller(w, 32.f)); }
__device__ __forceinline__ float decay_of(float w) { return exp2_(static_cast<float>(-kLog2e) * power_of(w)); }

// A step of the recurrence.
template <bool kSeven, class T, int kRows>
__device__ __forceinline__ void step(T (&S)[kRows][kQuad], const T (&d)[kRows], const T (&k)[kRows],
                                     const T (&b)[kRows], const T (&value)[kQuad], const T (&erased)[kQuad]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int q = 0; q < kQuad; ++q) {
      S[i][q] = d[i] * S[i][q] + k[i] * value[q];
      if (kSeven) S[i][q] += b[i] * erased[q];
    }
  }
}

// y: (directions, B, L, H, P), states before each chunk (directions, B, H, chunks, N, P).
template <class T, int N, bool kSeven>
__global__ void __launch_bounds__(kThreads)
    forward(const T* r_, i64 r_batch, i64 r_token, i64 r_head, const T* w_, i64 w_batch, i64 w_token, i64 w_head,
            const T* k_, i64 k_batch, i64 k_token, i64 k_head, const T* v_, i64 v_batch, i64 v_token, i64 v_head,
            const T* a_, i64 a_batch, i64 a_token, i64 a_head, const T* b_, i64 b_batch, i64 b_token, i64 b_head,
            const T* u, const int* order_, i64 order_batch, i64 B, i64 L, i64 H, i64 P, i64 steps, T* y, T* states) {
  constexpr int kBytes = sizeof(T) * N, kSteps = kBytes > 512 ? 4 : kBytes > 256 ? 8 : 16;
  constexpr int kPadded = Tile<N>::kPadded, kRows = Tile<N>::kRows, kSevenSteps = kSeven ? kSteps : 1;
  alignas(16) __shared__ T rs[kSteps][kPadded], ds[kSteps][kPadded], ks[kSteps][kPadded], vs[kSteps][kThreads];
  alignas(16) __shared__ T as[kSevenSteps][kPadded], bs[kSevenSteps][kPadded], us[kPadded];
  const Head head(blockIdx.x, B, H, Order{order_, order_batch, steps});
  const Rows<const T> r{r_, r_batch, r_token, r_head}, w{w_, w_batch, w_token, w_head}, k{k_, k_batch, k_token, k_head};
  const Rows<const T> v{v_, v_batch, v_token, v_head}, a{a_, a_batch, a_token, a_head}, b{b_, b_batch, b_token, b_head};
  const Tile<N> tile;
  const i64 p = threadIdx.x, chunks = (steps + kChunk - 1) / kChunk;
  const bool bonus = !kSeven && !head.direction;
  for (int n = threadIdx.x; n < kPadded; n += blockDim.x) us[n] = bonus && n < N ? u[head.h * N + n] : T(0);
  T S[kRows][kQuad] = {};
  for (i64 start = 0; start < steps; start += kSteps) {
    const int count = static_cast<int>(smaller<i64>(kSteps, steps - start));
    __syncthreads();
    stage(rs, r, head, start, count, N);
    stage(ds, w, head, start, count, N);
    stage(ks, k, head, start, count, N);
    stage(vs, v, head, start, count, P);
    if (kSeven) stage(as, a, head, start, count, N);
    if (kSeven) stage(bs, b, head, start, count, N);
    __syncthreads();
    for (int i = threadIdx.x; i < count * kPadded; i += blockDim.x) {
      ds[i / kPadded][i % kPadded] = decay_of(ds[i / kPadded][i % kPadded]);
    }
    __syncthreads();
    if (states && start % kChunk == 0) {
      tile.store_state(S, states + (head.index * chunks + start / kChunk) * N * P, P);
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      T row[kRows], d[kRows], key[kRows], value[kQuad], out[kQuad] = {}, erased[kQuad], erase[kRows], write[kRows];
      load(value, &vs[i][tile.column]);
      tile.rows(row, rs[i]);
      tile.rows(d, ds[i]);
      tile.rows(key, ks[i]);
      if (kSeven) {
        tile.rows(erase, as[kSeven ? i : 0]);
        tile.rows(write, bs[kSeven ? i : 0]);
        tile.columns(erased, erase, S);
        step<true>(S, d, key, write, value, erased);
      }
      T own = 0;
      if (bonus) {
        T weight[kRows];
        tile.rows(weight, us);
#pragma unroll
        for (int j = 0; j < kRows; ++j) own += row[j] * weight[j] * key[j];
      }
#pragma unroll
      for (int q = 0; q < kQuad; ++q) {
        out[q] = own * value[q];
#pragma unroll
        for (int j = 0; j < kRows; ++j) out[q] += row[j] * S[j][q];
      }
      if (!kSeven) step<false>(S, d, key, key, value, value);
      const T sum = own_column(out);
      const i64 l = head.token(start + i);
      if (p < P) y[(((head.direction * B + head.b) * L + l) * H + head.h) * P + p] = sum;
    }
  }
}

// Gradients are (directions, B, L, H, -), du (directions, B, H, N). `history` holds, for each block, the state before
// every kSub-th step of a chunk, (blocks, kChunk / kSub, rows, threads); those between are computed anew. A block takes
// one head after the other.
template <class T, int N, bool kSeven>
__global__ void __launch_bounds__(kThreads)
    backward(const T* dy_, i64 dy_batch, i64 dy_token, i64 dy_head, const T* r_, i64 r_batch, i64 r_token, i64 r_head,
             const T* w_, i64 w_batch, i64 w_token, i64 w_head, const T* k_, i64 k_batch, i64 k_token, i64 k_head,
             const T* v_, i64 v_batch, i64 v_token, i64 v_head, const T* a_, i64 a_batch, i64 a_token, i64 a_head,
             const T* b_, i64 b_batch, i64 b_token, i64 b_head, const T* u, const int* order_, i64 order_batch,
             i64 tasks, i64 B, i64 L, i64 H, i64 P, i64 steps, const T* states, T* history, T* dr, T* dw, T* dk, T* dv,
             T* da, T* db, T* du) {
  constexpr int kPadded = Tile<N>::kPadded, kRows = Tile<N>::kRows, kWarps = kThreads / 32, kGrads = kSeven ? 5 : 3;
  constexpr int kR = 0, kK = 1, kD = 2, kA = kSeven ? 3 : 0, kB = kSeven ? 4 : 0;
  constexpr int kSub = sizeof(T) * N > 512 ? 2 : 4, kSevenSub = kSeven ? kSub : 1;
  alignas(16) __shared__ T r[kSub][kPadded], w[kSub][kPadded], d[kSub][kPadded], k[kSub][kPadded];
  alignas(16) __shared__ T a[kSevenSub][kPadded], b[kSevenSub][kPadded], us[kPadded];
  alignas(16) __shared__ T v[kSub][kThreads], g[kSub][kThreads], parts[kGrads][kWarps][kPadded], products[2][kWarps];
  const Rows<const T> dys{dy_, dy_batch, dy_token, dy_head}, rs{r_, r_batch, r_token, r_head};
  const Rows<const T> ws{w_, w_batch, w_token, w_head}, ks{k_, k_batch, k_token, k_head};
  const Rows<const T> vs{v_, v_batch, v_token, v_head}, as{a_, a_batch, a_token, a_head},
      bs{b_, b_batch, b_token, b_head};
  const Tile<N> tile;
  const i64 p = threadIdx.x, chunks = (steps + kChunk - 1) / kChunk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const i64 state_size = static_cast<i64>(kPadded) * blockDim.x;
  T* past = history + blockIdx.x * (kChunk / kSub) * state_size;

  for (i64 task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Head head(task, B, H, Order{order_, order_batch, steps});
    const bool bonused = !kSeven && !head.direction;
    const auto vectors = [&](i64 first, int count) {  // of `count` steps, into shared memory
      __syncthreads();
      stage(r, rs, head, first, count, N);
      stage(w, ws, head, first, count, N);
      stage(k, ks, head, first, count, N);
      if (kSeven) stage(a, as, head, first, count, N);
      if (kSeven) stage(b, bs, head, first, count, N);
      stage(v, vs, head, first, count, P);
      stage(g, dys, head, first, count, P);
      for (int i = threadIdx.x; i < count * kPadded; i += blockDim.x) {  // what this thread has staged
        d[i / kPadded][i % kPadded] = decay_of(w[i / kPadded][i % kPadded]);
      }
      __syncthreads();
    };
    const auto advance_state = [&](T(&S)[kRows][kQuad], int i) {  // by step i of those in shared memory
      T decay[kRows], key[kRows], erase[kRows], write[kRows], value[kQuad], erased[kQuad];
      tile.rows(decay, d[i]);
      tile.rows(key, k[i]);
      load(value, &v[i][tile.column]);
      if (kSeven)
        tile.rows(erase, a[kSeven ? i : 0]), tile.rows(write, b[kSeven ? i : 0]), tile.columns(erased, erase, S);
      step<kSeven>(S, decay, key, kSeven ? write : key, value, kSeven ? erased : value);
    };
    for (int n = threadIdx.x; n < kPadded; n += blockDim.x) us[n] = bonused && n < N ? u[head.h * N + n] : T(0);
    T adjoint[kRows][kQuad] = {}, bonus[(kPadded + 31) / 32] = {};
    for (i64 chunk = chunks - 1; chunk >= 0; --chunk) {
      const i64 start = chunk * kChunk;
      const int count = static_cast<int>(smaller<i64>(kChunk, steps - start));
      {
        T S[kRows][kQuad];
        tile.load_state(S, states + (head.index * chunks + chunk) * N * P, P);
        for (int first = 0; first < count; first += kSub) {
          const int here = smaller(count - first, kSub);
          tile.remember(S, past + first / kSub * state_size);
          if (first + kSub >= count) break;
          vectors(start + first, here);
#pragma unroll 1
          for (int i = 0; i < here; ++i) advance_state(S, i);
        }
      }
#pragma unroll 1
      for (int step = count - 1, first = -1; step >= 0; --step) {
        const int i = step % kSub;
        const i64 l = head.token(start + step), row = ((head.direction * B + head.b) * L + l) * H + head.h;
        if (first != step - i) {
          first = step - i;
          vectors(start + first, i + 1);
        }
        T S[kRows][kQuad], x[kRows], value[kQuad], gradient[kQuad], erased[kQuad] = {}, to_erased[kQuad] = {};
        tile.recall(S, past + first / kSub * state_size);
#pragma unroll 1
        for (int j = 0; j < i; ++j) advance_state(S, j);
        load(value, &v[i][tile.column]);
        load(gradient, &g[i][tile.column]);
        const auto outer = [&](const T(&left)[kRows], const T(&right)[kQuad]) {  // to the adjoint
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
#pragma unroll
            for (int q = 0; q < kQuad; ++q) adjoint[j][q] += left[j] * right[q];
          }
        };
        const auto over_columns = [&](int grad, const T(&state)[kRows][kQuad], const T(&weight)[kQuad]) {
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            x[j] = 0;
#pragma unroll
            for (int q = 0; q < kQuad; ++q) x[j] += state[j][q] * weight[q];
          }
          sum_rows(parts[grad][warp], x, tile);
        };
        T own = 0, to_value[kQuad] = {};
        if (kSeven) {
          tile.rows(x, r[i]);
          outer(x, gradient);  // of the state that the step leaves
          tile.rows(x, a[kSeven ? i : 0]);
          tile.columns(erased, x, S);
          tile.rows(x, b[kSeven ? i : 0]);
          tile.columns(to_erased, x, adjoint);
        }
        T key[kRows];
        tile.rows(key, k[i]);
        if (bonused) {
          T weight[kRows];
          tile.rows(weight, us);
          tile.rows(x, r[i]);
#pragma unroll
          for (int j = 0; j < kRows; ++j) own += x[j] * weight[j] * key[j];
        }
#pragma unroll
        for (int q = 0; q < kQuad; ++q) {
          to_value[q] = own * gradient[q];
#pragma unroll
          for (int j = 0; j < kRows; ++j) to_value[q] += adjoint[j][q] * key[j];
        }
        const T value_gradient = own_column(to_value);
        if (p < P) dv[row * P + p] = value_gradient;
        // Of dr what goes through the state; what goes through erased and v needs but the sums of products.
        over_columns(kR, S, gradient);
        over_columns(kK, adjoint, value);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          x[j] = 0;
#pragma unroll
          for (int q = 0; q < kQuad; ++q) x[j] += adjoint[j][q] * S[j][q];
        }
        sum_rows(parts[kD][warp], x, tile);
        if (kSeven) over_columns(kA, S, to_erased);
        if (kSeven) over_columns(kB, adjoint, erased);
        T with_value[1] = {0}, with_erased[1] = {0};
#pragma unroll
        for (int q = 0; q < kQuad; ++q) {
          with_value[0] += tile.part == 0 ? value[q] * gradient[q] : T(0);
          with_erased[0] += tile.part == 0 && kSeven ? erased[q] * gradient[q] : T(0);
        }
        const T vg = warp_sums(with_value), eg = warp_sums(with_erased);
        if (lane == 0) products[0][warp] = vg, products[1][warp] = eg;
        T decay[kRows];
        tile.rows(decay, d[i]);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
#pragma unroll
          for (int q = 0; q < kQuad; ++q) adjoint[j][q] *= decay[j];
        }
        tile.rows(x, kSeven ? a[kSeven ? i : 0] : r[i]);
        outer(x, kSeven ? to_erased : gradient);
        __syncthreads();
        T together[2] = {};
        for (int j = 0; j < warps; ++j) together[0] += products[0][j], together[1] += products[1][j];
        for (int n = threadIdx.x, m = 0; n < N; n += blockDim.x, ++m) {
          T total[kGrads] = {};
#pragma unroll
          for (int grad = 0; grad < kGrads; ++grad) {
            for (int j = 0; j < warps; ++j) total[grad] += parts[grad][j][n];
          }
          const T un = us[n];
          if (kSeven) total[kR] = d[i][n] * total[kR] + b[kSeven ? i : 0][n] * together[1] + k[i][n] * together[0];
          dr[row * N + n] = total[kR] + un * k[i][n] * together[0];
          dk[row * N + n] = total[kK] + un * r[i][n] * together[0];
          dw[row * N + n] = -exp_(smaller(w[i][n], T(32))) * d[i][n] * total[kD];
          if (kSeven) da[row * N + n] = total[kA];
          if (kSeven) db[row * N + n] = total[kB];
          if (bonused) bonus[m] += r[i][n] * k[i][n] * together[0];
        }
        __syncthreads();
      }
    }
    for (int n = threadIdx.x, m = 0; n < N && !kSeven; n += blockDim.x, ++m) du[head.index * N + n] = bonus[m];
  }
}

// --- wkv6 on tensor cores -------------------------------------------------------------------------------------------
//
// Heads of N = P channels, in chunks of 16 steps. Within a chunk, whose steps are 0 .. 15 and which finds the state S:
//
//   y_t  = (r_t d_0 .. d_{t-1}) S + sum_{s<t} m_ts v_s + (r_t . u k_t) v_t
//   m_ts = sum over key channels of r_t k_s d_{s+1} .. d_{t-1}
//   S    becomes d_0 .. d_15 S + sum_s (k_s d_{s+1} .. d_15) v_s
//
// Every factor is a product of decays, at most 1: nothing overflows, and nothing is divided. For m_ts the chunk is
// halved again and again: s and t lie in the two halves of exactly one of its blocks of 2, 4, 8 and 16 steps. With the
// middle c of that block,
//
//   m_ts = sum over key channels of (r_t d_c .. d_{t-1}) (k_s d_{s+1} .. d_{c-1}),
//
// which for all blocks of a size is a matrix product, its `level`. With time reversed keys are what receptances are
// without: 0 .. 15 are then the steps 15 .. 0, and both are multiplied by the decays between them and a point before.

constexpr int kLevels = 4;
static_assert(kChunk == 1 << kLevels, "blocks of a chunk");

// The i-th of the eight steps in second halves of the blocks of a level.
__device__ __forceinline__ int second_half(int level, int i) {
  return ((i >> level) << (level + 1)) + (1 << level) + (i & ((1 << level) - 1));
}

// A chunk's steps of N channels as operands. Steps i and i + 8 lie side by side, and in every other two rows four
// columns are exchanged: a thread reads what it holds in one access, and the threads of a warp meet different banks.
template <int N>
struct Steps {
  float x[kChunk / 2][2 * N + 16];

  __device__ __forceinline__ static int column(int i, int n) { return 2 * (n ^ (i & 2) << 1); }
  __device__ __forceinline__ void put(int n, const float (&values)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const float two[2] = {values[i], values[i + 8]};
      store(&x[i][column(i, n)], two);
    }
  }
  __device__ __forceinline__ void take(int n, float (&values)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      float two[2];
      load(two, &x[i][column(i, n)]);
      values[i] = two[0], values[i + 8] = two[1];
    }
  }
  // Steps by channels c .. c + 7, terms q and q + 4 of the product being the channels c + 2q and c + 2q + 1.
  __device__ __forceinline__ Halves<4> left(int g, int q, int c) const {
    float a[4];
    load(a, &x[g][column(g, 2 * q) + 2 * c]);
    return Halves<4>(a);
  }
  // A result of that shape.
  __device__ __forceinline__ void put(int g, int q, int c, const float (&d)[4]) {
    const float a[4] = {d[0], d[2], d[1], d[3]};
    store(&x[g][column(g, 2 * q) + 2 * c], a);
  }
  // Steps by channels c .. c + 7, terms q and q + 4 of the product being the steps i and i + 8.
  __device__ __forceinline__ Halves<2> right(int g, int i, int c) const {
    float b[2];
    load(b, &x[i][column(i, g) + 2 * c]);
    return Halves<2>(b);
  }
};

// Channel n of receptances, or of keys with time reversed, times all decays before in the chunk; their product.
template <int N>
__device__ __forceinline__ float put_decayed(Steps<N>& out, int n, const float (&x)[kChunk], const float (&d)[kChunk]) {
  float past = 1, product[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    product[i] = past * x[i];
    past *= d[i];
  }
  out.put(n, product);
  return past;
}

// Of some levels the steps of second halves, times the decays before them there.
template <int N, int kHeld = kLevels>
struct SecondHalves {
  float x[kHeld][kChunk / 2][N + 8];

  __device__ __forceinline__ void put(int n, const float (&values)[kChunk], const float (&d)[kChunk], int first = 0) {
#pragma unroll
    for (int level = first; level < first + kHeld; ++level) {
      float past = 1;
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        if (i % (1 << level) == 0) past = 1;
        x[level - first][i][n] = past * values[second_half(level, i)];
        past *= d[second_half(level, i)];
      }
    }
  }
};

// What a thread is to a chunk: channel n of r (side 0; in wkv7 also of a) or of k (side 1, with time reversed; in wkv7
// also of b); lane 4 g + q of its warp's
// operands, see `mma_tf32`; and its warp has 16 channels of the state from `first` on, of values forward, of keys
// backward.
struct Part {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = lane / 16, n = warp * 16 + lane % 16;
  int g = lane / 4, q = lane % 4, first = warp * 16;
};

// Of every step the warp's part of the products of `x` with what the other side has as `shared`: lane i and lane i + 16
// get that of their side's step i.
__device__ __forceinline__ float step_products(const float (&x)[kChunk], const float (&shared)[kChunk]) {
  float terms[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) terms[i] = x[i] * __shfl_xor_sync(0xffffffffu, shared[15 - i], 16);
  return warp_sums<kChunk, 8>(terms);
}

// The warp's part of r_t . u k_t, of channel n's r or k and u.
template <int kWarps>
__device__ __forceinline__ void put_bonus(float (&out)[kWarps][kChunk], const float (&x)[kChunk], float u,
                                          const Part& own) {
  float weighted[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) weighted[i] = u * x[i];
  const float sum = step_products(weighted, x);
  if (own.side == 0) out[own.warp][own.lane] = sum;
}

using Scores = float[kChunk][kChunk + 4];  // m_ts, the second index with time reversed: 15 - s

// Whether in the products of a level the rows i and j belong to one block: i's time runs forwards, j's backwards.
__device__ __forceinline__ bool together(int level, int i, int j) {
  return (i >> level) + (j >> level) == (8 >> level) - 1;
}

// Two columns of eight rows as a left operand of sixteen: below the rows, what tf32 leaves of them.
__device__ __forceinline__ void stacked(float (&a)[4], const Halves<2>& x) {
  a[0] = x.high[0], a[1] = x.low[0], a[2] = x.high[1], a[3] = x.low[1];
}

// m_ts of the pairs of a level.
template <int kRow>
__device__ __forceinline__ void score(Scores& m, const float (&r)[kChunk / 2][kRow], const float (&k)[kChunk / 2][kRow],
                                      int level, const Part& own) {
  float sum[4] = {};
#pragma unroll
  for (int c = 2 * own.q; c < kRow - 8; c += 8) {
    float row[2], key[2], a[4];
    load(row, &r[own.g][c]);
    load(key, &k[own.g][c]);
    const Halves<2> right(key);
    stacked(a, Halves<2>(row));
    mma_tf32(sum, a, right.low);
    mma_tf32(sum, a, right.high);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = 2 * own.q + j;
    if (together(level, own.g, i)) m[second_half(level, own.g)][second_half(level, i)] = sum[j] + sum[2 + j];
  }
}

// y: (directions, B, L, H, N), states before each chunk (directions, B, H, chunks, N, N).
template <int N>
__global__ void __launch_bounds__(2 * N, 256 / N)
    forward6(const float* r_, i64 r_batch, i64 r_token, i64 r_head, const float* w_, i64 w_batch, i64 w_token,
             i64 w_head, const float* k_, i64 k_batch, i64 k_token, i64 k_head, const float* v_, i64 v_batch,
             i64 v_token, i64 v_head, const float* u, const int* order_, i64 order_batch, i64 B, i64 L, i64 H,
             i64 steps, float* y, float* states) {
  constexpr int kWarps = N / 16;
  alignas(16) __shared__ Steps<N> sides[2];
  alignas(16) __shared__ SecondHalves<N> halves[2];
  alignas(16) __shared__ float whole[N], bonuses[kWarps][kChunk];
  alignas(16) __shared__ int tokens[4][2][kChunk];  // of the last chunks and the next one
  __shared__ Scores scores;
  const Head head(blockIdx.x, B, H, Order{order_, order_batch, steps});
  const Part own;
  const bool bonused = !head.direction;
  const float bonus = bonused ? u[head.h * N + own.n] : 0.f;
  const Tokens<const float> xs(
      own.side ? k_ : r_,
      own.side ? head.b * k_batch + head.h * k_head + own.n : head.b * r_batch + head.h * r_head + own.n,
      own.side ? k_token : r_token);
  const Tokens<const float> ws(w_, head.b * w_batch + head.h * w_head + own.n, w_token);
  const Tokens<const float> vs(v_, head.b * v_batch + head.h * v_head + own.first + own.g, v_token);
  const Tokens<float> ys(y, ((head.direction * B + head.b) * L * H + head.h) * N + own.first + 2 * own.q, H * N);
  const int chunks = static_cast<int>((steps + kChunk - 1) / kChunk), last = static_cast<int>(steps) - 1;

  // The token of one of 32 steps of a chunk: of its sixteen, and of them with time reversed.
  const auto visited = [&](int chunk) {
    const int i = own.lane % 16;
    return static_cast<int>(head.token(smaller(chunk * kChunk + (own.side ? 15 - i : i), last)));
  };
  // A chunk: a channel of r or k and of w, and of v steps 15 - q - 4 i of columns g and g + 8.
  float x[kChunk], w[kChunk], v[4][2];
  const auto fetch = [&](int chunk) {
    int at[kChunk], row[4];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) at[i] = tokens[chunk & 3][own.side][i];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = tokens[chunk & 3][1][own.q + 4 * i];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = read<1>(xs.at(at[i])).x[0], w[i] = read<1>(ws.at(at[i])).x[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i][0] = read<1>(vs.at(row[i])).x[0], v[i][1] = read<1>(vs.at(row[i]) + 8).x[0];
  };

  float S[N / 8][4] = {};  // columns g (twice), g + 8 (twice) of rows 8 j + 2q and 8 j + 2q + 1
  for (int i = threadIdx.x; i < kChunk * kChunk; i += blockDim.x) scores[i / kChunk][i % kChunk] = 0;
  if (own.warp == 0) tokens[0][own.side][own.lane % 16] = visited(0);
  int next = visited(1);
  __syncthreads();
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int start = chunk * kChunk, count = smaller(kChunk, last + 1 - start);
    float d[kChunk], value[2][4];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = decay_of(w[i]);
    if (count < kChunk) {  // steps that write, read and forget nothing
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if ((own.side ? 15 - i : i) >= count) x[i] = 0, d[i] = 1;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (15 - own.q - 4 * i >= count) v[i][0] = v[i][1] = 0;
      }
    }
    halves[own.side].put(own.n, x, d);
    const float decay = put_decayed(sides[own.side], own.n, x, d);
    if (own.side == 0) whole[own.n] = decay;
    if (bonused) put_bonus(bonuses, x, bonus, own);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i / 4][i % 4] = v[i / 4 + i % 4 / 2 * 2][i % 2];
    const Halves<4> values[2] = {Halves<4>(value[0]), Halves<4>(value[1])};  // v, transposed
    if (own.warp == 0) {
      tokens[(chunk + 1) & 3][own.side][own.lane % 16] = next;
      next = visited(chunk + 2);
    }
    __syncthreads();
    if (chunk + 1 < chunks) fetch(chunk + 1);
    for (int level = own.warp; level < kLevels; level += kWarps)
      score(scores, halves[0].x[level], halves[1].x[level], level, own);
    if (bonused && threadIdx.x < kChunk) {
      float sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += bonuses[i][threadIdx.x];
      scores[threadIdx.x][15 - threadIdx.x] = sum;
    }
    float out[2][4] = {};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Halves<4> row = sides[0].left(own.g, own.q, 8 * j);
      const float left[2] = {S[j][0], S[j][1]}, right[2] = {S[j][2], S[j][3]};
      mma(out[0], row, Halves<2>(left));
      mma(out[1], row, Halves<2>(right));
    }
    if (states) {
      float* at = advance(states + (head.index * chunks + chunk) * N * N + own.first + own.g, 2 * own.q, 4 * N);
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) write_one(at + (8 * j + i % 2) * N + i / 2 * 8, S[j][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float left[2], written[4] = {};  // added apart: tensor cores round towards 0, which would add up
      load(left, &whole[8 * j + 2 * own.q]);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma(written, values[i], sides[1].right(own.g, 4 * i + own.q, 8 * j));
#pragma unroll
      for (int i = 0; i < 4; ++i) S[j][i] = S[j][i] * left[i % 2] + written[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int s = own.q + 4 * i;
      const float m[4] = {scores[own.g][s], scores[own.g + 8][s], scores[own.g][s + 8], scores[own.g + 8][s + 8]};
      const Halves<4> weights(m);
      mma(out[0], weights, values[i].columns(0));
      mma(out[1], weights, values[i].columns(1));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = own.g + 8 * i;
      if (t >= count) continue;
      float* at = ys.at(tokens[chunk & 3][0][t]);
      const float low[2] = {out[0][2 * i], out[0][2 * i + 1]}, high[2] = {out[1][2 * i], out[1][2 * i + 1]};
      write(at, low);
      write(at + 8, high);
    }
  }
}

// The gradients of m_ts, sums of `kParts`, of a level as a left operand: of r's second halves with k's, or transposed.
template <int kParts>
__device__ __forceinline__ void score_gradients(float (&out)[4], const Scores* parts, bool transposed, int level,
                                                const Part& own) {
  float sum[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = second_half(level, own.g), other = second_half(level, own.q + 4 * j);
    sum[j] = 0;
    for (int i = 0; i < kParts; ++i) sum[j] += transposed ? parts[i][other][row] : parts[i][row][other];
    if (!together(level, own.g, own.q + 4 * j)) sum[j] = 0;
  }
  stacked(out, Halves<2>(sum));
}

// Puts the gradients of the second halves of a level in their place, for the channels from `first` on. In `halves`,
// each of the first `kPairs` has been multiplied with each of as many behind them; `parts` has `kParts` for each
// product.
template <int kChannels, int kPairs, int kParts, int N, int kHeld>
__device__ __forceinline__ void differentiate(SecondHalves<N, kHeld> (&halves)[2 * kPairs], int held,
                                              const Scores* parts, int level, int first, const Part& own) {
  constexpr int kPart = kPairs == 1 ? kChannels : 16;  // channels at once, as registers allow
  float to[2][kPairs][kPairs][4];                      // of those in front with those behind, and the other way round
#pragma unroll
  for (int i = 0; i < 2 * kPairs * kPairs; ++i) {
    const int behind = i / (kPairs * kPairs), front = i / kPairs % kPairs, back = i % kPairs;
    score_gradients<kParts>(to[behind][front][back], parts + (i % (kPairs * kPairs)) * kParts, behind, level, own);
  }
#pragma unroll
  for (int c = first; c < first + kChannels; c += kPart) {
    float x[2 * kPairs][kPart / 8][2];
#pragma unroll
    for (int j = 0; j < kPart / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4 * kPairs; ++i) {
        x[i / 2][j][i % 2] = halves[i / 2].x[held][own.q + 4 * (i % 2)][c + 8 * j + own.g];
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kPart / 8; ++j) {
      float dx[2 * kPairs][4] = {};
#pragma unroll
      for (int front = 0; front < kPairs; ++front) {
#pragma unroll
        for (int back = 0; back < kPairs; ++back) {
          const Halves<2> row(x[front][j]), key(x[kPairs + back][j]);
          mma_tf32(dx[front], to[0][front][back], key.low);
          mma_tf32(dx[front], to[0][front][back], key.high);
          mma_tf32(dx[kPairs + back], to[1][front][back], row.low);
          mma_tf32(dx[kPairs + back], to[1][front][back], row.high);
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const float sums[2] = {dx[i][0] + dx[i][2], dx[i][1] + dx[i][3]};
        store(&halves[i].x[held][own.g][c + 8 * j + 2 * own.q], sums);
      }
    }
  }
}

// Of channel n, x times all decays before in the chunk has the gradient dx, which becomes that of x. Adds to the
// gradient of log d what goes through these products, and `sum`, through the product of all decays.
__device__ __forceinline__ void through_decays(float (&dx)[kChunk], float (&dlog)[kChunk], const float (&x)[kChunk],
                                               const float (&d)[kChunk], float sum) {
  float past = 1;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    dx[i] *= past;
    past *= d[i];
  }
#pragma unroll
  for (int i = kChunk - 1; i >= 0; --i) {
    dlog[i] += sum;
    sum += x[i] * dx[i];
  }
}

// The same for the second halves of the levels from `first` on, whose gradients are in their place. Adds to dx.
template <int N, int kHeld>
__device__ __forceinline__ void through_levels(float (&dx)[kChunk], float (&dlog)[kChunk], const float (&x)[kChunk],
                                               const float (&d)[kChunk], const SecondHalves<N, kHeld>& gradients, int n,
                                               int first = 0) {
#pragma unroll
  for (int level = first; level < first + kHeld; ++level) {
    float terms[kChunk / 2], past = 1, sum = 0;
#pragma unroll
    for (int row = 0; row < kChunk / 2; ++row) {
      const int i = second_half(level, row);
      if (row % (1 << level) == 0) past = 1;
      const float to_x = past * gradients.x[level - first][row][n];
      past *= d[i];
      dx[i] += to_x;
      terms[row] = x[i] * to_x;
    }
#pragma unroll
    for (int row = kChunk / 2 - 1; row >= 0; --row) {
      if ((row + 1) % (1 << level) == 0) sum = 0;
      dlog[second_half(level, row)] += sum;
      sum += terms[row];
    }
  }
}

// Gradients are (directions, B, L, H, N), du (directions, B, H, N). With D the adjoint of the state that a chunk leaves
// and g_ts = dy_t . v_s, the gradient of m_ts:
//
//   gradient of r_t d_0 .. d_{t-1}    S dy_t           dv_s = sum_{t>=s} m_ts dy_t + (k_s d_{s+1} .. d_15) D
//   gradient of k_s d_{s+1} .. d_15   D v_s            D becomes d_0 .. d_15 D + sum_t (r_t d_0 .. d_{t-1}) dy_t
//
// and of each level, of its factors of r the products of g with those of k, and the reverse. The gradient of log d_j is
// the sum, over all such products of decays that hold d_j, of what the product and its gradient give multiplied. None
// of its terms is without d_j, so none has to cancel.
template <int N>
__global__ void __launch_bounds__(2 * N, 192 / N)
    backward6(const float* dy_, i64 dy_batch, i64 dy_token, i64 dy_head, const float* r_, i64 r_batch, i64 r_token,
              i64 r_head, const float* w_, i64 w_batch, i64 w_token, i64 w_head, const float* k_, i64 k_batch,
              i64 k_token, i64 k_head, const float* v_, i64 v_batch, i64 v_token, i64 v_head, const float* u,
              const int* order_, i64 order_batch, i64 B, i64 L, i64 H, i64 steps, const float* states, float* dr,
              float* dw, float* dk, float* dv, float* du) {
  constexpr int kWarps = N / 16, kRow = N + 4;
  union Work {  // first the adjoint of the state, then the levels and their gradients
    float adjoint[N][kRow];
    SecondHalves<N> halves[2];
  };
  alignas(16) __shared__ Work work;
  alignas(16) __shared__ Steps<N> sides[2], values[2];  // of r and k, later their gradients; of dy, and v reversed
  alignas(16) __shared__ Scores scores, parts[kWarps];
  __shared__ float decays[kChunk][N];  // kept here: with them a thread would want more than 168 registers
  alignas(16) __shared__ float whole[N], with_state[N], bonus_gradients[N], bonuses[kWarps][kChunk], own_scores[kChunk];
  alignas(16) __shared__ int tokens[2][2][kChunk];  // of a chunk, and of the one after it or before it
  const Head head(blockIdx.x, B, H, Order{order_, order_batch, steps});
  const Part own;
  const bool bonused = !head.direction, reversed = own.side;
  const float bonus = bonused ? u[head.h * N + own.n] : 0.f;
  const i64 x_at = reversed ? head.b * k_batch + head.h * k_head : head.b * r_batch + head.h * r_head;
  const i64 z_at = reversed ? head.b * v_batch + head.h * v_head : head.b * dy_batch + head.h * dy_head;
  const Tokens<const float> xs(reversed ? k_ : r_, x_at + own.n, reversed ? k_token : r_token);
  const Tokens<const float> zs(reversed ? v_ : dy_, z_at + own.n, reversed ? v_token : dy_token);
  const Tokens<const float> ws(w_, head.b * w_batch + head.h * w_head + own.n, w_token);
  const i64 first = ((head.direction * B + head.b) * L * H + head.h) * N;
  const Tokens<float> dxs(reversed ? dk : dr, first + own.n, H * N), dws(dw, first + own.n, H * N);
  const Tokens<float> dvs(dv, first + own.first + 2 * own.q, H * N);
  const int chunks = static_cast<int>((steps + kChunk - 1) / kChunk), last = static_cast<int>(steps) - 1;
  const auto step = [&](int i) { return reversed ? 15 - i : i; };
  const auto visited = [&](int chunk) {  // as in `forward6`
    return static_cast<int>(head.token(smaller(larger(chunk, 0) * kChunk + step(own.lane % 16), last)));
  };

  float D[N / 8][4] = {};  // rows g (twice), g + 8 (twice) of columns 8 j + 2q and 8 j + 2q + 1
  if (own.side == 0) bonus_gradients[own.n] = 0;
  for (int i = threadIdx.x; i < kChunk * kChunk; i += blockDim.x) scores[i / kChunk][i % kChunk] = 0;
  if (own.warp == 0) tokens[(chunks - 1) % 2][own.side][own.lane % 16] = visited(chunks - 1);
  __syncthreads();
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int start = chunk * kChunk, count = smaller(kChunk, last + 1 - start);
    const int (&token)[kChunk] = tokens[chunk % 2][own.side];

    // Channel n of r or k, of w, and of dy or v; rows g and g + 8 of the state.
    float x[kChunk], d[kChunk], z[kChunk], S[N / 8][4];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[i] = read<1>(xs.at(token[i])).x[0];
      d[i] = read<1>(ws.at(token[i])).x[0];
      z[i] = read<1>(zs.at(token[i])).x[0];
    }
    const float* state = states + (head.index * chunks + chunk) * N * N + own.first * N + 2 * own.q;
    state = advance(state, own.g, 4 * N);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Pack<float, 2> upper = read<2>(state + 8 * j), lower = read<2>(state + 8 * N + 8 * j);
      S[j][0] = upper.x[0], S[j][1] = upper.x[1], S[j][2] = lower.x[0], S[j][3] = lower.x[1];
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = decay_of(d[i]);
    if (count < kChunk) {  // steps that write, read and forget nothing
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (step(i) >= count) x[i] = z[i] = 0, d[i] = 1;
      }
    }
    const float decay = put_decayed(sides[own.side], own.n, x, d);
    if (own.side == 0) {
      whole[own.n] = decay;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) decays[i][own.n] = d[i];
    }
    values[own.side].put(own.n, z);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float upper[2] = {D[j][0], D[j][1]}, lower[2] = {D[j][2], D[j][3]};
      store(&work.adjoint[own.first + own.g][8 * j + 2 * own.q], upper);
      store(&work.adjoint[own.first + own.g + 8][8 * j + 2 * own.q], lower);
    }
    __syncthreads();

    // What goes through the states: to r and k by the warp's rows, to v by its columns; and the warp's part of g_ts.
    float to_r[2][4] = {}, to_k[2][4] = {}, to_v[2][4] = {}, part[2][4] = {}, product[2] = {};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Halves<4> dy = values[0].left(own.g, own.q, 8 * j), v = values[1].left(own.g, own.q, 8 * j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float of_state[2] = {S[j][2 * i], S[j][2 * i + 1]}, of_adjoint[2] = {D[j][2 * i], D[j][2 * i + 1]};
        mma(to_r[i], dy, Halves<2>(of_state));
        mma(to_k[i], v, Halves<2>(of_adjoint));
        product[i] += of_state[0] * of_adjoint[0] + of_state[1] * of_adjoint[1];
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Halves<4> dy = values[0].left(own.g, own.q, own.first + 8 * j);
      const Halves<4> v = values[1].left(own.g, own.q, own.first + 8 * j);
      mma(part[0], dy, v.columns(0));
      mma(part[1], dy, v.columns(1));
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Halves<4> key = sides[1].left(own.g, own.q, 8 * j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (*rows)[kRow] = work.adjoint + 8 * j + 2 * own.q;
        const float of_adjoint[2] = {rows[0][own.first + 8 * i + own.g], rows[1][own.first + 8 * i + own.g]};
        mma(to_v[i], key, Halves<2>(of_adjoint));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      product[i] += __shfl_xor_sync(0xffffffffu, product[i], 1);
      product[i] += __shfl_xor_sync(0xffffffffu, product[i], 2);
      if (own.q == 0) with_state[own.first + own.g + 8 * i] = product[i];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float two[2] = {part[j][2 * i], part[j][2 * i + 1]};
        store(&parts[own.warp][own.g + 8 * i][8 * j + 2 * own.q], two);
      }
    }
    const float left[2] = {whole[own.first + own.g], whole[own.first + own.g + 8]};
    const Halves<4> rows[2] = {
        Halves<4>(sides[0].right(own.g, own.q, own.first), sides[0].right(own.g, own.q, own.first + 8)),
        Halves<4>(sides[0].right(own.g, 4 + own.q, own.first), sides[0].right(own.g, 4 + own.q, own.first + 8))};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float written[4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) mma(written, rows[i], values[0].right(own.g, 4 * i + own.q, 8 * j));
#pragma unroll
      for (int i = 0; i < 4; ++i) D[j][i] = D[j][i] * left[i / 2] + written[i];
    }
    __syncthreads();

    // The levels.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sides[0].put(own.g, own.q, own.first + 8 * i, to_r[i]);
      sides[1].put(own.g, own.q, own.first + 8 * i, to_k[i]);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = decays[step(i)][own.n];
    work.halves[own.side].put(own.n, x, d);
    if (bonused) put_bonus(bonuses, x, bonus, own);
    __syncthreads();
    const int next = visited(chunk - 1);
    for (int level = own.warp; level < kLevels; level += kWarps) {
      score(scores, work.halves[0].x[level], work.halves[1].x[level], level, own);
      differentiate<N, 1, kWarps>(work.halves, level, parts, level, 0, own);
    }
    if (own.warp == 0) tokens[(chunk + 1) % 2][own.side][own.lane % 16] = next;
    if (bonused && threadIdx.x < kChunk) {
      float sum = 0, gradient = 0;
      for (int i = 0; i < kWarps; ++i) {
        sum += bonuses[i][threadIdx.x];
        gradient += parts[i][threadIdx.x][15 - threadIdx.x];
      }
      scores[threadIdx.x][15 - threadIdx.x] = sum;
      own_scores[threadIdx.x] = gradient;
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = own.q + 4 * i;
      const float m[4] = {scores[t][own.g], scores[t][own.g + 8], scores[t + 8][own.g], scores[t + 8][own.g + 8]};
      const Halves<4> weights(m);
#pragma unroll
      for (int j = 0; j < 2; ++j) mma(to_v[j], weights, values[0].right(own.g, 4 * i + own.q, own.first + 8 * j));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int s = own.g + 8 * i;
      if (15 - s >= count) continue;
      float* at = dvs.at(tokens[chunk % 2][1][s]);
      const float low[2] = {to_v[0][2 * i], to_v[0][2 * i + 1]}, high[2] = {to_v[1][2 * i], to_v[1][2 * i + 1]};
      write(at, low);
      write(at + 8, high);
    }
    float w[kChunk / 2];  // of the first steps by either side's time
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) w[i] = read<1>(ws.at(token[i])).x[0];
    // Channel n of r or k, and of log d what goes through its products.
    float dx[kChunk], dlog[kChunk] = {};
    sides[own.side].take(own.n, dx);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = decays[step(i)][own.n];
    through_decays(dx, dlog, x, d, own.side == 0 ? whole[own.n] * with_state[own.n] : 0.f);
    through_levels(dx, dlog, x, d, work.halves[own.side], own.n);
    if (bonused) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float to_x = own_scores[step(i)] * __shfl_xor_sync(0xffffffffu, x[15 - i], 16);
        dx[i] += bonus * to_x;
        sum += x[i] * to_x;
      }
      if (own.side == 0) bonus_gradients[own.n] += sum;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (step(i) < count) write_one(dxs.at(token[i]), dx[i]);
    }
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const float total = dlog[i] + __shfl_xor_sync(0xffffffffu, dlog[15 - i], 16);
      if (step(i) < count) write_one(dws.at(token[i]), -power_of(w[i]) * total);
    }
    __syncthreads();
  }
  if (own.side == 0) du[head.index * N + own.n] = bonus_gradients[own.n];
}

// --- wkv7 on tensor cores -------------------------------------------------------------------------------------------
//
// S_t is now the state that step t finds, and e_t = a_t S_t what it erases. The recurrence is that of wkv6, but two
// vectors read the state, r' = r d and a, and two write to it, k writes v and b writes e:
//
//   S_{t+1} = d_t S_t + k_t v_t + b_t e_t
//   e_t     = (a_t d_0 .. d_{t-1}) S  + sum_{s<t} ak_ts v_s + sum_{s<t} ab_ts e_s
//   y_t     = (r'_t d_0 .. d_{t-1}) S + sum_{s<=t} rk_ts v_s + sum_{s<=t} rb_ts e_s
//   S       becomes d_0 .. d_15 S + sum_s (k_s d_{s+1} .. d_15) v_s + sum_s (b_s d_{s+1} .. d_15) e_s
//
// rk_ts, rb_ts, ak_ts and ab_ts, for s < t, are the m_ts of r' or a with k or b; rk_tt = r_t . k_t, rb_tt = r_t . b_t.
// The equations for e are solved step after step, without an inverse, which may be large where e is not. They are
// computed transposed, a row being a value channel: each warp solves those of its own channels, and the results of a
// product are operands of the next as they lie.

enum { kReads, kErases, kWrites, kReplaces };  // r', a, k, b
enum { kRK, kRB, kAK, kAB };                   // scores: number 2 i + j for i = r', a and j = k, b

constexpr int kHeld = 2;  // levels in shared memory at once

// Of a warp's 16 value channels and 16 steps what a thread holds, the results of two products: [h][2 c + i] is channel
// g + 8 c at step 2 q + i + 8 h. Steps may be counted with time reversed.
using Columns = float[2][4];

__device__ __forceinline__ int held_step(int h, int i, const Part& own) { return 2 * own.q + i % 2 + 8 * h; }

// As left operands: terms q and q + 4 of number i are the steps 2 q + i + 8 and 2 q + i.
struct Operands {
  Halves<4> half[2];
  __device__ __forceinline__ explicit Operands(const Columns& x) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float a[4] = {x[1][i], x[1][2 + i], x[0][i], x[0][2 + i]};
      half[i] = Halves<4>(a);
    }
  }
};

// The row of `Steps` that has these two steps where it counts them with time reversed.
__device__ __forceinline__ int reversed_row(int i, const Part& own) { return 7 - 2 * own.q - i; }

// `first` points to channel g of the warp.
__device__ __forceinline__ void read_columns(Columns& x, const Tokens<const float>& first, const int (&tokens)[kChunk],
                                             const Part& own) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* at = first.at(tokens[held_step(h, i, own)]);
      x[h][i] = read<1>(at).x[0], x[h][2 + i] = read<1>(at + 8).x[0];
    }
  }
}

// Steps from `count` on have the value 0, and are not written.
template <bool kReversed>
__device__ __forceinline__ void cut_columns(Columns& x, int count, const Part& own) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int step = held_step(i / 4, i, own);
    if ((kReversed ? 15 - step : step) >= count) x[i / 4][i % 4] = 0;
  }
}
template <bool kReversed>
__device__ __forceinline__ void write_columns(const Tokens<float>& first, const Columns& x, const int (&tokens)[kChunk],
                                              int count, const Part& own) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = held_step(h, i, own);
      if ((kReversed ? 15 - step : step) >= count) continue;
      float* at = first.at(tokens[step]);
      write_one(at, x[h][i]);
      write_one(at + 8, x[h][2 + i]);
    }
  }
}

// As steps counted with time reversed.
template <int N>
__device__ __forceinline__ void put_columns(Steps<N>& out, const Columns& x, const Part& own) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = reversed_row(i % 2, own);
    const float two[2] = {x[1][i], x[0][i]};
    store(&out.x[row][out.column(row, own.first + own.g + i / 2 * 8)], two);
  }
}

// m_ts; with time reversed, what step 15 - t has given to step 15 - s.
template <bool kReversed>
__device__ __forceinline__ float weight(const Scores& m, int t, int s) {
  return kReversed ? m[15 - s][t] : m[t][15 - s];
}

// out_t += sum_s m_ts x_s; with time reversed, its transpose.
template <bool kReversed>
__device__ __forceinline__ void add_steps(Columns& out, const Operands& x, const Scores& m, const Part& own) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = own.g + 8 * h, s = held_step(0, i, own);
      const float weights[2] = {weight<kReversed>(m, t, s + 8), weight<kReversed>(m, t, s)};
      mma(out[h], x.half[i], Halves<2>(weights));
    }
  }
}

// x_t += sum_{s<t} m_ts x_s, step after step; with time reversed, its transpose. Two steps at once, of which the first
// gives to the second.
template <bool kReversed>
__device__ __forceinline__ void solve(Columns& x, const Scores& m, const Part& own) {
#pragma unroll
  for (int s = 0; s < kChunk; s += 2) {
    float first[2], second[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int lane = 4 * own.g + s % 8 / 2;  // which holds both
      first[c] = __shfl_sync(0xffffffffu, x[s / 8][2 * c], lane);
      second[c] = __shfl_sync(0xffffffffu, x[s / 8][2 * c + 1], lane) + weight<kReversed>(m, s + 1, s) * first[c];
    }
#pragma unroll
    for (int h = s / 8; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of m, what is not below the diagonal is 0
        const int t = held_step(h, i, own);
        x[h][i] += weight<kReversed>(m, t, s) * first[i / 2] + weight<kReversed>(m, t, s + 1) * second[i / 2];
      }
    }
  }
}

// All scores of the levels from `first` on; warps share the work.
template <int N>
__device__ __forceinline__ void score_all(Scores (&scores)[4], const SecondHalves<N, kHeld> (&halves)[4], int first,
                                          const Part& own) {
  constexpr int kWarps = N / 16;
#pragma unroll
  for (int i = 0; i < 4 * kHeld / kWarps; ++i) {
    const int level = (own.warp + i * kWarps) / 4, pair = (own.warp + i * kWarps) % 4;
    score(scores[pair], halves[pair / 2].x[level], halves[2 + pair % 2].x[level], first + level, own);
  }
}

// The warp's part of r_t . k_t and of r_t . b_t, of channel n's r and a, or k and b.
template <int kWarps>
__device__ __forceinline__ void put_products(float (&out)[kWarps][32], const float (&x)[kChunk],
                                             const float (&z)[kChunk], const Part& own) {
  float of_side[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) of_side[i] = own.side ? z[i] : x[i];
  out[own.warp][own.lane] = step_products(of_side, x);
}

// The sums of these parts, in their place.
template <int kWarps>
__device__ __forceinline__ void score_own(Scores (&scores)[4], const float (&parts)[kWarps][32]) {
  if (threadIdx.x >= 32) return;
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += parts[i][threadIdx.x];
  const int t = threadIdx.x % 16;
  if (threadIdx.x < 16) {
    scores[kRK][t][15 - t] = sum;
  } else {
    scores[kRB][15 - t][t] = sum;
  }
}

// y: (directions, B, L, H, N), states before each chunk (directions, B, H, chunks, N, N).
template <int N>
__global__ void __launch_bounds__(2 * N, 192 / N)
    forward7(const float* r_, i64 r_batch, i64 r_token, i64 r_head, const float* w_, i64 w_batch, i64 w_token,
             i64 w_head, const float* k_, i64 k_batch, i64 k_token, i64 k_head, const float* v_, i64 v_batch,
             i64 v_token, i64 v_head, const float* a_, i64 a_batch, i64 a_token, i64 a_head, const float* b_,
             i64 b_batch, i64 b_token, i64 b_head, const int* order_, i64 order_batch, i64 B, i64 L, i64 H, i64 steps,
             float* y, float* states) {
  constexpr int kWarps = N / 16;
  alignas(16) __shared__ Steps<N> sides[4];
  alignas(16) __shared__ SecondHalves<N, kHeld> halves[4];
  alignas(16) __shared__ Scores scores[4];
  alignas(16) __shared__ float whole[N];
  __shared__ float products[kWarps][32];
  alignas(16) __shared__ int tokens[2][2][kChunk];  // of a chunk and the next one
  const Head head(blockIdx.x, B, H, Order{order_, order_batch, steps});
  const Part own;
  const i64 r_at = head.b * r_batch + head.h * r_head, k_at = head.b * k_batch + head.h * k_head;
  const i64 a_at = head.b * a_batch + head.h * a_head, b_at = head.b * b_batch + head.h * b_head;
  const Tokens<const float> xs(own.side ? k_ : r_, (own.side ? k_at : r_at) + own.n, own.side ? k_token : r_token);
  const Tokens<const float> zs(own.side ? b_ : a_, (own.side ? b_at : a_at) + own.n, own.side ? b_token : a_token);
  const Tokens<const float> ws(w_, head.b * w_batch + head.h * w_head + own.n, w_token);
  const Tokens<const float> vs(v_, head.b * v_batch + head.h * v_head + own.first + own.g, v_token);
  const Tokens<float> ys(y, ((head.direction * B + head.b) * L * H + head.h) * N + own.first + own.g, H * N);
  const int chunks = static_cast<int>((steps + kChunk - 1) / kChunk), last = static_cast<int>(steps) - 1;
  const auto visited = [&](int chunk) {  // as in `forward6`
    const int i = own.lane % 16;
    return static_cast<int>(head.token(smaller(chunk * kChunk + (own.side ? 15 - i : i), last)));
  };
  float S[N / 8][4] = {};  // columns g (twice), g + 8 (twice) of rows 8 j + 2q and 8 j + 2q + 1
  for (int i = threadIdx.x; i < 4 * kChunk * kChunk; i += blockDim.x) scores[i / 256][i / 16 % 16][i % 16] = 0;
  if (own.warp == 0) tokens[0][own.side][own.lane % 16] = visited(0);
  int next = visited(1);
  __syncthreads();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int start = chunk * kChunk, count = smaller(kChunk, last + 1 - start);
    const int (&token)[kChunk] = tokens[chunk % 2][0];
    const int visits = ((1 << count) - 1) << (own.side ? kChunk - count : 0);  // which steps are, by the side's time
    // Channel n of r or k, of a or b, and of w; the warp's columns of v.
    float x[kChunk], z[kChunk], d[kChunk];
    Columns v;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int at = tokens[chunk % 2][own.side][i];
      x[i] = read<1>(xs.at(at)).x[0], z[i] = read<1>(zs.at(at)).x[0], d[i] = read<1>(ws.at(at)).x[0];
    }
    read_columns(v, vs, token, own);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = decay_of(d[i]);
    if (count < kChunk) {  // steps that write, read and forget nothing
      cut_columns<false>(v, count, own);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (!(visits >> i & 1)) x[i] = z[i] = 0, d[i] = 1;
      }
    }
    put_products(products, x, z, own);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] *= own.side ? 1.f : d[i];  // r' from here on
    const float decay = put_decayed(sides[2 * own.side], own.n, x, d);
    put_decayed(sides[2 * own.side + 1], own.n, z, d);
    if (own.side == 0) whole[own.n] = decay;
    if (own.warp == 0) {
      tokens[(chunk + 1) % 2][own.side][own.lane % 16] = next;
      next = visited(chunk + 2);
    }
#pragma unroll
    for (int level = 0; level < kLevels; level += kHeld) {
      halves[2 * own.side].put(own.n, x, d, level);
      halves[2 * own.side + 1].put(own.n, z, d, level);
      __syncthreads();
      score_all(scores, halves, level, own);
      if (level == 0) score_own(scores, products);
      __syncthreads();
    }
    if (states) {
      float* at = advance(states + (head.index * chunks + chunk) * N * N + own.first + own.g, 2 * own.q, 4 * N);
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) write_one(at + (8 * j + i % 2) * N + i / 2 * 8, S[j][i]);
      }
    }

    Columns out = {}, e = {};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float a[4] = {S[j][0], S[j][2], S[j][1], S[j][3]};
      const Halves<4> state(a), reads = sides[kReads].left(own.g, own.q, 8 * j);
      const Halves<4> erases = sides[kErases].left(own.g, own.q, 8 * j);
#pragma unroll
      for (int h = 0; h < 2; ++h) mma(out[h], state, reads.columns(h)), mma(e[h], state, erases.columns(h));
    }
    const Operands value(v);
    add_steps<false>(e, value, scores[kAK], own);
    solve<false>(e, scores[kAB], own);
    const Operands erased(e);
    add_steps<false>(out, value, scores[kRK], own);
    add_steps<false>(out, erased, scores[kRB], own);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float forgotten[2], written[4] = {};  // added apart: tensor cores round towards 0, which would add up
      load(forgotten, &whole[8 * j + 2 * own.q]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma(written, value.half[i], sides[kWrites].right(own.g, reversed_row(i, own), 8 * j));
        mma(written, erased.half[i], sides[kReplaces].right(own.g, reversed_row(i, own), 8 * j));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) S[j][i] = S[j][i] * forgotten[i % 2] + written[i];
    }
    write_columns<false>(ys, out, token, count, own);
    __syncthreads();
  }
}

// Gradients are (directions, B, L, H, N). With D the adjoint of the state that a chunk leaves, the gradients f of e are
// solved from the last step to the first:
//
//   f_s  = (b_s d_{s+1} .. d_15) D + sum_{t>=s} rb_ts dy_t + sum_{t>s} ab_ts f_t
//   dv_s = (k_s d_{s+1} .. d_15) D + sum_{t>=s} rk_ts dy_t + sum_{t>s} ak_ts f_t
//
// and the rest is as in `backward6`: what reads, r' and a, has the gradients dy and f of what it reads, and what is
// written, k and b, writes v and e.
template <int N>
__global__ void __launch_bounds__(2 * N, 192 / N)
    backward7(const float* dy_, i64 dy_batch, i64 dy_token, i64 dy_head, const float* r_, i64 r_batch, i64 r_token,
              i64 r_head, const float* w_, i64 w_batch, i64 w_token, i64 w_head, const float* k_, i64 k_batch,
              i64 k_token, i64 k_head, const float* v_, i64 v_batch, i64 v_token, i64 v_head, const float* a_,
              i64 a_batch, i64 a_token, i64 a_head, const float* b_, i64 b_batch, i64 b_token, i64 b_head,
              const int* order_, i64 order_batch, i64 B, i64 L, i64 H, i64 steps, const float* states, float* dr,
              float* dw, float* dk, float* dv, float* da, float* db) {
  constexpr int kWarps = N / 16, kRow = N + 4;
  constexpr int kShare = kWarps > 1 ? kWarps / 2 : 1;  // warps that share a level
  union Work {                                         // one after the other
    SecondHalves<N, kHeld> halves[4];
    float adjoint[N][kRow];
    Steps<N> values[4];  // dy, f, and with time reversed v, e
  };
  alignas(16) __shared__ Work work;
  alignas(16) __shared__ Steps<N> sides[4];  // later their gradients
  alignas(16) __shared__ Scores scores[4];   // later their gradients
  __shared__ float decays[kChunk][N];
  __shared__ float whole[N], with_state[N], products[kWarps][32];
  alignas(16) __shared__ int tokens[2][2][kChunk];  // of a chunk, and of the one after it or before it
  const Head head(blockIdx.x, B, H, Order{order_, order_batch, steps});
  const Part own;
  const bool reversed = own.side;
  const i64 r_at = head.b * r_batch + head.h * r_head, k_at = head.b * k_batch + head.h * k_head;
  const i64 a_at = head.b * a_batch + head.h * a_head, b_at = head.b * b_batch + head.h * b_head;
  const i64 v_at = head.b * v_batch + head.h * v_head, dy_at = head.b * dy_batch + head.h * dy_head;
  const Tokens<const float> xs(reversed ? k_ : r_, (reversed ? k_at : r_at) + own.n, reversed ? k_token : r_token);
  const Tokens<const float> zs(reversed ? b_ : a_, (reversed ? b_at : a_at) + own.n, reversed ? b_token : a_token);
  const Tokens<const float> ws(w_, head.b * w_batch + head.h * w_head + own.n, w_token);
  const i64 first = ((head.direction * B + head.b) * L * H + head.h) * N;
  // The others are made where they are used: all along, a thread would want more than 168 registers.
  const auto column = [&] { return fresh(own.first + own.g); };
  const auto gradients = [&](float* of, int n) { return Tokens<float>(of, first + n, H * N); };
  const int chunks = static_cast<int>((steps + kChunk - 1) / kChunk), last = static_cast<int>(steps) - 1;
  const auto step = [&](int i) { return reversed ? 15 - i : i; };
  const auto visited = [&](int chunk) {  // as in `forward6`
    return static_cast<int>(head.token(smaller(larger(chunk, 0) * kChunk + step(own.lane % 16), last)));
  };

  float D[N / 8][4] = {};  // rows g (twice), g + 8 (twice) of columns 8 j + 2q and 8 j + 2q + 1
  for (int i = threadIdx.x; i < 4 * kChunk * kChunk; i += blockDim.x) scores[i / 256][i / 16 % 16][i % 16] = 0;
  if (own.warp == 0) tokens[(chunks - 1) % 2][own.side][own.lane % 16] = visited(chunks - 1);
  __syncthreads();
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int start = chunk * kChunk, count = smaller(kChunk, last + 1 - start);
    const int (&token)[kChunk] = tokens[chunk % 2][own.side];
    const int visits = ((1 << count) - 1) << (reversed ? kChunk - count : 0);
    const auto there = [&](int i) { return (visits >> i & 1) != 0; };  // whether step i, by the side's time, is one

    // Channel n of r or k, of a or b, and of w; the warp's columns of v, and of dy with time reversed.
    float x[kChunk], z[kChunk], d[kChunk];
    Columns v, dy;
    const auto fetch = [&](float (&out)[kChunk], const Tokens<const float>& rows) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[i] = read<1>(rows.at(token[i])).x[0];
      if (count == kChunk) return;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {  // steps that write and read nothing
        if (!there(i)) out[i] = 0;
      }
    };
    fetch(x, xs), fetch(z, zs);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = read<1>(ws.at(token[i])).x[0];
    read_columns(v, {v_, v_at + column(), v_token}, tokens[chunk % 2][0], own);
    read_columns(dy, {dy_, dy_at + column(), dy_token}, tokens[chunk % 2][1], own);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) d[i] = decay_of(d[i]);
    if (count < kChunk) {
      cut_columns<false>(v, count, own);
      cut_columns<true>(dy, count, own);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (!there(i)) d[i] = 1;
      }
    }
    put_products(products, x, z, own);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] *= reversed ? 1.f : d[i];  // r' from here on
    const float decay = put_decayed(sides[2 * own.side], own.n, x, d);
    put_decayed(sides[2 * own.side + 1], own.n, z, d);
    if (own.side == 0) {
      whole[own.n] = decay;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) decays[i][own.n] = d[i];
    }
#pragma unroll
    for (int level = 0; level < kLevels; level += kHeld) {
      work.halves[2 * own.side].put(own.n, x, d, level);
      work.halves[2 * own.side + 1].put(own.n, z, d, level);
      __syncthreads();
      score_all(scores, work.halves, level, own);
      if (level == 0) score_own(scores, products);
      __syncthreads();
    }

    // By columns: e, then f and dv.
    float S[N / 8][4];  // columns g, g + 8 of rows 8 j + 2q, then of 8 j + 2q + 1
    const float* state = states + (head.index * chunks + chunk) * N * N;
    const float* columns = advance(state + own.first + own.g, 2 * own.q, 4 * N);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[j][i] = read<1>(columns + (8 * j + i / 2) * N + i % 2 * 8).x[0];
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float upper[2] = {D[j][0], D[j][1]}, lower[2] = {D[j][2], D[j][3]};
      store(&work.adjoint[own.first + own.g][8 * j + 2 * own.q], upper);
      store(&work.adjoint[own.first + own.g + 8][8 * j + 2 * own.q], lower);
    }
    Columns e = {}, f = {}, to_v = {};
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Halves<4> of_state(S[j]), erases = sides[kErases].left(own.g, own.q, 8 * j);
#pragma unroll
      for (int h = 0; h < 2; ++h) mma(e[h], of_state, erases.columns(h));
    }
    add_steps<false>(e, Operands(v), scores[kAK], own);
    solve<false>(e, scores[kAB], own);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float (*rows)[kRow] = work.adjoint + 8 * j + 2 * own.q;
      const int c = own.first + own.g;
      const float a[4] = {rows[0][c], rows[0][c + 8], rows[1][c], rows[1][c + 8]};
      const Halves<4> of_adjoint(a), key = sides[kWrites].left(own.g, own.q, 8 * j);
      const Halves<4> replace = sides[kReplaces].left(own.g, own.q, 8 * j);
#pragma unroll
      for (int h = 0; h < 2; ++h) mma(to_v[h], of_adjoint, key.columns(h)), mma(f[h], of_adjoint, replace.columns(h));
    }
    const Operands gradient(dy);
    add_steps<true>(f, gradient, scores[kRB], own);
    solve<true>(f, scores[kAB], own);
    add_steps<true>(to_v, gradient, scores[kRK], own);
    add_steps<true>(to_v, Operands(f), scores[kAK], own);
    write_columns<true>(gradients(dv, column()), to_v, tokens[chunk % 2][1], count, own);

    // By rows, of S and D: the gradients of what reads and is written, and of the scores; then D before the chunk.
    const float* rows = advance(state + own.first * N + 2 * own.q, own.g, 4 * N);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Pack<float, 2> upper = read<2>(rows + 8 * j), lower = read<2>(rows + 8 * N + 8 * j);
      S[j][0] = upper.x[0], S[j][1] = upper.x[1], S[j][2] = lower.x[0], S[j][3] = lower.x[1];
    }
    __syncthreads();
    put_columns(work.values[0], dy, own);
    put_columns(work.values[1], f, own);
    put_columns(work.values[2], v, own);
    put_columns(work.values[3], e, own);
    __syncthreads();
    float to_sides[4][2][4] = {}, product[2] = {};
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float (&rows)[4] = k == 0 ? S[j] : D[j];
        const float upper[2] = {rows[0], rows[1]}, lower[2] = {rows[2], rows[3]};
        const Halves<2> right[2] = {Halves<2>(upper), Halves<2>(lower)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Halves<4> value = work.values[k + i].left(own.g, own.q, 8 * j);
          mma(to_sides[k + i][0], value, right[0]);
          mma(to_sides[k + i][1], value, right[1]);
          if (k == 0) product[i] += S[j][2 * i] * D[j][2 * i] + S[j][2 * i + 1] * D[j][2 * i + 1];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      product[i] += __shfl_xor_sync(0xffffffffu, product[i], 1);
      product[i] += __shfl_xor_sync(0xffffffffu, product[i], 2);
      if (own.q == 0) with_state[own.first + own.g + 8 * i] = product[i];
    }
#pragma unroll
    for (int i = 0; i < 4 / kWarps; ++i) {
      const int pair = own.warp + i * kWarps, reads = pair / 2, diagonal = reads == kReads;
      float part[2][4] = {};
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const Halves<4> left = work.values[reads].left(own.g, own.q, 8 * j);
        const Halves<4> right = work.values[2 + pair % 2].left(own.g, own.q, 8 * j);
#pragma unroll
        for (int h = 0; h < 2; ++h) mma(part[h], left, right.columns(h));
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int t = own.g + k % 4 / 2 * 8, s = held_step(k / 4, k, own);
        scores[pair][t][s] = t + s + diagonal > 15 ? part[k / 4][k % 4] : 0.f;
      }
    }
    const float left[2] = {whole[own.first + own.g], whole[own.first + own.g + 8]};
    Halves<4> reads[2][2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Steps<N>& of = sides[k / 2];
      const int row = 4 * (k % 2) + own.q;
      reads[k / 2][k % 2] = Halves<4>(of.right(own.g, row, own.first), of.right(own.g, row, own.first + 8));
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float written[4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        mma(written, reads[k / 2][k % 2], work.values[k / 2].right(own.g, 4 * (k % 2) + own.q, 8 * j));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) D[j][i] = D[j][i] * left[i / 2] + written[i];
    }
    __syncthreads();

    // The levels.
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sides[k].put(own.g, own.q, own.first + 8 * i, to_sides[k][i]);
    }
    if (own.warp == 0) tokens[(chunk + 1) % 2][own.side][own.lane % 16] = visited(chunk - 1);
    fetch(x, xs), fetch(z, zs);
    const auto recall_decays = [&] {
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {  // not by `step`: addresses would take registers
        const float early = decays[i][own.n], late = decays[15 - i][own.n];
        d[i] = reversed ? late : early, d[15 - i] = reversed ? early : late;
      }
    };
    recall_decays();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] *= reversed ? 1.f : d[i];
    float dx[kChunk], dz[kChunk], dlog[kChunk] = {};
#pragma unroll
    for (int level = 0; level < kLevels; level += kHeld) {
      work.halves[2 * own.side].put(own.n, x, d, level);
      work.halves[2 * own.side + 1].put(own.n, z, d, level);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kHeld * kShare / kWarps; ++i) {
        const int held = own.warp / kShare + i * kWarps / kShare;
        const int first_channel = own.warp % kShare * (N / kShare);
        differentiate<N / kShare, 2, 1>(work.halves, held, scores, level + held, first_channel, own);
      }
      __syncthreads();
      recall_decays();
      sides[2 * own.side].take(own.n, dx);
      sides[2 * own.side + 1].take(own.n, dz);
      if (level == 0) {
        through_decays(dx, dlog, x, d, own.side == 0 ? whole[own.n] * with_state[own.n] : 0.f);
        through_decays(dz, dlog, z, d, 0.f);
      }
      through_levels(dx, dlog, x, d, work.halves[2 * own.side], own.n, level);
      through_levels(dz, dlog, z, d, work.halves[2 * own.side + 1], own.n, level);
      if (level + kHeld == kLevels) break;
      sides[2 * own.side].put(own.n, dx);  // kept there: with them a thread would want more than 168 registers
      sides[2 * own.side + 1].put(own.n, dz);
    }
    float w[kChunk / 2];  // of the first steps by either side's time
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) w[i] = read<1>(ws.at(token[i])).x[0];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (!reversed) dlog[i] += x[i] * dx[i], dx[i] *= d[i];  // from r' to r
    }
    fetch(x, xs);
    const int n = fresh(own.n);
    const Tokens<float> dxs = gradients(reversed ? dk : dr, n), dzs = gradients(reversed ? db : da, n);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {  // the step's own products
      const int t = step(i);
      const float to_rk = scores[kRK][t][15 - t], to_rb = scores[kRB][t][15 - t];
      const float other_x = __shfl_xor_sync(0xffffffffu, x[15 - i], 16);
      const float other_z = __shfl_xor_sync(0xffffffffu, z[15 - i], 16);
      dx[i] += to_rk * other_x;
      (reversed ? dz[i] : dx[i]) += to_rb * (reversed ? other_x : other_z);
      if (there(i)) write_one(dxs.at(token[i]), dx[i]), write_one(dzs.at(token[i]), dz[i]);
    }
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const float total = dlog[i] + __shfl_xor_sync(0xffffffffu, dlog[15 - i], 16);
      if (there(i)) write_one(gradients(dw, n).at(token[i]), -power_of(w[i]) * total);
    }
  }
}
