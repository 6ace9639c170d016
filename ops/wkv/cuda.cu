// WKV on CUDA, forward and backward.
//
// bi_wkv: a thread is a channel of a batch item and a segment of its steps. `bi_ends` sums each segment as seen from
// its end and from its start, `bi_carry` joins the segments from both sides, and `bi_sweep` walks each between the two.
// As on the CPU the exponent of a sum is computed anew at every step, of its largest key and its distance; exponents
// are in base 2.
//
// wkv6, wkv7: a block is a direction of a head of a batch item. A thread is a value channel, a column of the state,
// whose N rows (key channels) it holds in registers.

#include "device.cuh"

constexpr int kChunk = LINZOO_CHUNK;
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

// What a step adds: forward (its key, v, 1), backward (-peak, dy / den, dy y / den).
template <class T, bool kBackward>
struct Terms {
  Rows<const T> first, second;  // k, v or scale, dy
  const T* y;                   // (B, L, C)
  i64 L, C;
  __device__ __forceinline__ void read(i64 b, i64 l, i64 c, T& key, T& x, T& other) const {
    const T* at = first.at(b, l, 0) + c;
    key = kBackward ? -at[0] : at[0];
    x = *(second.at(b, l, 0) + c);
    if (kBackward) x /= at[C];
    other = kBackward ? x * y[(b * L + l) * C + c] : T(1);
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
  const Terms<T, kBackward> terms{
      {first_, first_batch, first_token, 0}, {second_, second_batch, second_token, 0}, y, L, C};
  const T decay = w[p.c];
  Sums<T, kBackward> past, future;
#pragma unroll 4
  for (i64 t = p.begin; t < p.end; ++t) {
    T key, x, other;
    terms.read(p.b, order.token(p.b, 0, t), p.c, key, x, other);
    past.pass(key, x, other, decay);
    future.add(key, x, other, T(t - p.begin), decay);
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
#pragma unroll 4
  for (i64 k = 0; k < segments; ++k) {
    const i64 segment = backwards ? segments - 1 - k : k;
    T* at = ends + (sb * segments + segment) * Sums<T, kBackward>::kFields * C + c;
    Sums<T, kBackward> own;
    own.load(at, C);
    sums.store(at, C);
    sums.move(T(smaller(segment_steps, steps - segment * segment_steps)));
    sums.join(own, decay);
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
  const Rows<const T> k{k_, k_batch, k_token, 0}, v{v_, v_batch, v_token, 0}, dy{dy_, dy_batch, dy_token, 0};
  const Rows<const T> scales{scale, 2 * L * C, 2 * C, 0};
  const Terms<T, kBackward> terms{kBackward ? scales : k, kBackward ? dy : v, y_, L, C};
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
    for (i64 t = smaller(start + kChunk, p.end) - 1; t >= start; --t) {
      T key, x, other;
      terms.read(p.b, order.token(p.b, 0, t), p.c, key, x, other);
      future.pass(key, x, other, decay);
    }
  }
  Sum<T> sum_w, sum_u;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const i64 start = p.begin + chunk * kChunk;
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    T keys[kChunk], xs[kChunk], others[kChunk];
    Side futures[kChunk];
    future.load(&marks[chunk][0][threadIdx.x], kThreads);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) terms.read(p.b, order.token(p.b, 0, start + i), p.c, keys[i], xs[i], others[i]);
    }
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
        y_[at] = (left * past.x + right * futures[i].x + self * xs[i]) / den;
        if (scale) scale[at + (p.b * L + l) * C] = peak, scale[at + (p.b * L + l + 1) * C] = den;
      } else {
        const T key = *(k.at(p.b, l, 0) + p.c), value = *(v.at(p.b, l, 0) + p.c);
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

template <int N, class T>
__device__ __forceinline__ void stage(T (*out)[N], const Rows<const T>& rows, const Head& head, i64 start, int count) {
  for (int i = threadIdx.x; i < count * N; i += blockDim.x) {
    out[i / N][i % N] = *(rows.at(head.b, head.token(start + i / N), head.h) + i % N);
  }
}

// Beyond 32 the decay is 0 in any dtype, and so is its derivative.
template <class T>
__device__ __forceinline__ T decay_of(T w) {
  return exp_(-exp_(smaller(w, T(32))));
}

// y: (directions, B, L, H, P), states before each chunk (directions, B, H, chunks, N, P).
template <class T, int N, bool kSeven>
__global__ void __launch_bounds__(kThreads)
    forward(const T* r_, i64 r_batch, i64 r_token, i64 r_head, const T* w_, i64 w_batch, i64 w_token, i64 w_head,
            const T* k_, i64 k_batch, i64 k_token, i64 k_head, const T* v_, i64 v_batch, i64 v_token, i64 v_head,
            const T* a_, i64 a_batch, i64 a_token, i64 a_head, const T* b_, i64 b_batch, i64 b_token, i64 b_head,
            const T* u, const int* order_, i64 order_batch, i64 B, i64 L, i64 H, i64 P, i64 steps, T* y, T* states) {
  constexpr int kSteps = sizeof(T) * N > 256 ? 8 : 16, kExtra = kSeven ? N : 1;
  __shared__ T rs[kSteps][N], ds[kSteps][N], ks[kSteps][N], as[kSteps][kExtra], bs[kSteps][kExtra], own[kSteps];
  const Head head(blockIdx.x, B, H, Order{order_, order_batch, steps});
  const Rows<const T> r{r_, r_batch, r_token, r_head}, w{w_, w_batch, w_token, w_head}, k{k_, k_batch, k_token, k_head};
  const Rows<const T> v{v_, v_batch, v_token, v_head}, a{a_, a_batch, a_token, a_head}, b{b_, b_batch, b_token, b_head};
  const i64 p = threadIdx.x, chunks = (steps + kChunk - 1) / kChunk;
  const bool active = p < P;
  T S[N] = {};
  for (i64 start = 0; start < steps; start += kSteps) {
    const int count = static_cast<int>(smaller<i64>(kSteps, steps - start));
    __syncthreads();
    stage<N>(rs, r, head, start, count);
    stage<N>(ds, w, head, start, count);
    stage<N>(ks, k, head, start, count);
    if (kSeven) stage<kExtra>(as, a, head, start, count);
    if (kSeven) stage<kExtra>(bs, b, head, start, count);
    __syncthreads();
    for (int i = threadIdx.x; i < count * N; i += blockDim.x) ds[i / N][i % N] = decay_of(ds[i / N][i % N]);
    for (int i = threadIdx.x; i < count && !kSeven; i += blockDim.x) {
      T sum = 0;
      for (int n = 0; n < N && !head.direction; ++n) sum += rs[i][n] * u[head.h * N + n] * ks[i][n];
      own[i] = sum;
    }
    __syncthreads();
    if (!active) continue;
    if (states && start % kChunk == 0) {
      T* at = states + (head.index * chunks + start / kChunk) * N * P + p;
#pragma unroll
      for (int n = 0; n < N; ++n) at[n * P] = S[n];
    }
    for (int i = 0; i < count; ++i) {
      const i64 l = head.token(start + i);
      const T value = *(v.at(head.b, l, head.h) + p);
      T out = 0, erased = 0;
      if (kSeven) {
#pragma unroll
        for (int n = 0; n < N; ++n) erased += as[i][kSeven ? n : 0] * S[n];
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (!kSeven) out += rs[i][n] * S[n];
        S[n] = ds[i][n] * S[n] + ks[i][n] * value;
        if (kSeven) S[n] += bs[i][kSeven ? n : 0] * erased;
        if (kSeven) out += rs[i][n] * S[n];
      }
      if (!kSeven) out += own[i] * value;
      y[(((head.direction * B + head.b) * L + l) * H + head.h) * P + p] = out;
    }
  }
}

// Gradients are (directions, B, L, H, -), du (directions, B, H, N). `history` holds the states of a chunk for each
// block, (blocks, kChunk, N, P); a block takes one head after the other.
template <class T, int N, bool kSeven>
__global__ void __launch_bounds__(kThreads)
    backward(const T* dy_, i64 dy_batch, i64 dy_token, i64 dy_head, const T* r_, i64 r_batch, i64 r_token, i64 r_head,
             const T* w_, i64 w_batch, i64 w_token, i64 w_head, const T* k_, i64 k_batch, i64 k_token, i64 k_head,
             const T* v_, i64 v_batch, i64 v_token, i64 v_head, const T* a_, i64 a_batch, i64 a_token, i64 a_head,
             const T* b_, i64 b_batch, i64 b_token, i64 b_head, const T* u, const int* order_, i64 order_batch,
             i64 tasks, i64 B, i64 L, i64 H, i64 P, i64 steps, const T* states, T* history, T* dr, T* dw, T* dk, T* dv,
             T* da, T* db, T* du) {
  constexpr int kPadded = (N + 31) / 32 * 32, kWarps = kThreads / 32, kGrads = kSeven ? 5 : 3;
  constexpr int kR = 0, kK = 1, kD = 2, kA = kSeven ? 3 : 0, kB = kSeven ? 4 : 0;
  __shared__ T r[N], w[N], d[N], k[N], a[kSeven ? N : 1], b[kSeven ? N : 1], parts[kGrads][kWarps][kPadded], vg[kWarps];
  const Rows<const T> dys{dy_, dy_batch, dy_token, dy_head}, rs{r_, r_batch, r_token, r_head};
  const Rows<const T> ws{w_, w_batch, w_token, w_head}, ks{k_, k_batch, k_token, k_head},
      vs{v_, v_batch, v_token, v_head};
  const Rows<const T> as{a_, a_batch, a_token, a_head}, bs{b_, b_batch, b_token, b_head};
  const i64 p = threadIdx.x, chunks = (steps + kChunk - 1) / kChunk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const bool active = p < P;
  T* past = history + static_cast<i64>(blockIdx.x) * kChunk * N * P + p;

  for (i64 task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Head head(task, B, H, Order{order_, order_batch, steps});
    T adjoint[N] = {}, bonus[kPadded / 32] = {};
    for (i64 chunk = chunks - 1; chunk >= 0; --chunk) {
      const i64 start = chunk * kChunk;
      const int count = static_cast<int>(smaller<i64>(kChunk, steps - start));
      {  // the states before each step of the chunk
        T S[N];
#pragma unroll
        for (int n = 0; n < N; ++n) S[n] = active ? states[((head.index * chunks + chunk) * N + n) * P + p] : T(0);
        for (int i = 0; i < count; ++i) {
          const i64 l = head.token(start + i);
          __syncthreads();
          for (int n = threadIdx.x; n < N; n += blockDim.x) {
            d[n] = decay_of(*(ws.at(head.b, l, head.h) + n));
            k[n] = *(ks.at(head.b, l, head.h) + n);
            if (kSeven) a[n] = *(as.at(head.b, l, head.h) + n);
            if (kSeven) b[n] = *(bs.at(head.b, l, head.h) + n);
          }
          __syncthreads();
          if (!active) continue;
          const T value = *(vs.at(head.b, l, head.h) + p);
          T erased = 0;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            past[(static_cast<i64>(i) * N + n) * P] = S[n];
            if (kSeven) erased += a[kSeven ? n : 0] * S[n];
          }
#pragma unroll
          for (int n = 0; n < N; ++n) {
            S[n] = d[n] * S[n] + k[n] * value;
            if (kSeven) S[n] += b[kSeven ? n : 0] * erased;
          }
        }
      }
      for (int i = count - 1; i >= 0; --i) {
        const i64 l = head.token(start + i), row = ((head.direction * B + head.b) * L + l) * H + head.h;
        __syncthreads();
        for (int n = threadIdx.x; n < N; n += blockDim.x) {
          r[n] = *(rs.at(head.b, l, head.h) + n);
          w[n] = *(ws.at(head.b, l, head.h) + n);
          d[n] = decay_of(w[n]);
          k[n] = *(ks.at(head.b, l, head.h) + n);
          if (kSeven) a[n] = *(as.at(head.b, l, head.h) + n);
          if (kSeven) b[n] = *(bs.at(head.b, l, head.h) + n);
        }
        __syncthreads();
        const T g = active ? *(dys.at(head.b, l, head.h) + p) : T(0);
        const T value = active ? *(vs.at(head.b, l, head.h) + p) : T(0);
        T own = 0, to_value = 0, erased = 0, to_erased = 0, S[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          S[n] = active ? past[(static_cast<i64>(i) * N + n) * P] : T(0);
          if (kSeven) {
            adjoint[n] += r[n] * g;  // of the state that the step leaves
            erased += a[kSeven ? n : 0] * S[n];
            to_erased += b[kSeven ? n : 0] * adjoint[n];
          } else if (!head.direction) {
            own += r[n] * u[head.h * N + n] * k[n];
          }
          to_value += adjoint[n] * k[n];
        }
        if (active) dv[row * P + p] = to_value + own * g;
        const T product[1] = {value * g};
        const T sum = warp_sums(product);
        if (lane == 0) vg[warp] = sum;
#pragma unroll
        for (int grad = 0; grad < kGrads; ++grad) {
#pragma unroll
          for (int first = 0; first < kPadded; first += 32) {
            T values[32];
#pragma unroll
            for (int j = 0; j < 32; ++j) {
              const int n = first + j < N ? first + j : 0;
              T x = 0;
              if (grad == kR) {
                x = (kSeven ? d[n] * S[n] + b[kSeven ? n : 0] * erased + k[n] * value : S[n]) * g;
              } else if (grad == kK) {
                x = adjoint[n] * value;
              } else if (grad == kD) {
                x = adjoint[n] * S[n];
              } else if (grad == kA) {
                x = S[n] * to_erased;
              } else {
                x = adjoint[n] * erased;
              }
              values[j] = first + j < N ? x : T(0);
            }
            parts[grad][warp][first + lane] = warp_sums(values);
          }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
          adjoint[n] = d[n] * adjoint[n] + (kSeven ? a[kSeven ? n : 0] * to_erased : r[n] * g);
        }
        __syncthreads();
        T together = 0;
        for (int j = 0; j < warps; ++j) together += vg[j];
        for (int n = threadIdx.x, m = 0; n < N; n += blockDim.x, ++m) {
          T total[kGrads] = {};
#pragma unroll
          for (int grad = 0; grad < kGrads; ++grad) {
            for (int j = 0; j < warps; ++j) total[grad] += parts[grad][j][n];
          }
          const bool bonused = !kSeven && !head.direction;
          const T un = bonused ? u[head.h * N + n] : T(0);
          dr[row * N + n] = total[kR] + un * k[n] * together;
          dk[row * N + n] = total[kK] + un * r[n] * together;
          dw[row * N + n] = -exp_(smaller(w[n], T(32))) * d[n] * total[kD];
          if (kSeven) da[row * N + n] = total[kA];
          if (kSeven) db[row * N + n] = total[kB];
          if (bonused) bonus[m] += r[n] * k[n] * together;
        }
      }
    }
    for (int n = threadIdx.x, m = 0; n < N && !kSeven; n += blockDim.x, ++m) du[head.index * N + n] = bonus[m];
  }
}
