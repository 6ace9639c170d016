// The mLSTM on CUDA, forward and backward, on tensor cores.
//
//   m_t = max(log f_t + m_{t-1}, i_t)
//   g_t = log f_t + m_{t-1} - m_t,         beta_t = exp(i_t - m_t) / sqrt(P)
//   S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T,      n_t = exp(g_t) n_{t-1} + beta_t k_t
//   h_t = S_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps)
//
// Steps are taken in chunks of 64. `maximum` goes through the gates. `carry`, the one sequential part, takes the states
// from chunk to chunk, and backwards their adjoints D. Then `apply` does all chunks at once: from it come h and the
// gradients of q, k and v. The backward pass begins with `through_h` and ends with `gates` and `maximum_backward`.
//
// m, and since_t, the sum of g from the start of the chunk to step t, are taken in double precision: decays between two
// steps are differences of such sums, and keep their digits. A state lies as (P + 1, P), key by value and n last.

#include "device.cuh"

constexpr int kSteps = 64;  // of a chunk
constexpr int kWide = 48;   // columns of a result, and rows of a state, that a block computes
constexpr int kDeep = 16;   // terms of a product that lie in shared memory at once
constexpr int kBlocks = kWide / 8;

__device__ __forceinline__ float exp_of(double x) { return exp2_(static_cast<float>(x * 1.4426950408889634)); }

// A chunk of steps of a head; indices of what has one number per step and head, (B, L, H).
struct Chunk {
  i64 b, h, L, H, chunk, chunks;
  int start, count;
  __device__ __forceinline__ Chunk(i64 head, i64 chunk, i64 L, i64 H)
      : L(L), H(H), chunk(chunk), chunks((L + kSteps - 1) / kSteps) {
    b = static_cast<unsigned>(head) / static_cast<unsigned>(H);  // 32-bit divisions are a tenth of 64-bit ones
    h = head - b * H;
    start = static_cast<int>(chunk) * kSteps;
    count = smaller(kSteps, static_cast<int>(L) - start);
  }
  __device__ __forceinline__ i64 at(int t) const { return (b * L + start + smaller(t, count - 1)) * H + h; }
  __device__ __forceinline__ i64 state(i64 P) const { return ((b * H + h) * chunks + chunk) * (P + 1) * P; }
};

// Rows of some columns on their way from global to shared memory, the part of a thread; 0 beyond what is there.
template <int kRows, int kColumns, int kBlock, int V>
struct Piece {
  static constexpr int kAll = kRows * kColumns / V, kCount = (kAll + kBlock - 1) / kBlock;  // accesses, of a thread
  float x[kCount][V];
  __device__ __forceinline__ static int row(int i) { return (threadIdx.x + i * kBlock) / (kColumns / V); }
  __device__ __forceinline__ static int column(int i) { return (threadIdx.x + i * kBlock) % (kColumns / V) * V; }
  __device__ __forceinline__ static bool has(int i) { return kAll % kBlock == 0 || row(i) < kRows; }
  __device__ __forceinline__ void fetch(const float* from, i64 stride, int rows, int columns) {
    const unsigned bytes = static_cast<unsigned>(stride) * sizeof(float);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[i][v] = 0;
      if (has(i) && row(i) < rows && column(i) < columns)
        unpack(x[i], read<V>(advance(from + column(i), row(i), bytes)));
    }
  }
  template <int kStride>
  __device__ __forceinline__ void put(float (*to)[kStride]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (has(i)) store(&to[row(i)][column(i)], x[i]);
    }
  }
};

// A lane of a warp, which has 16 rows: see `mma_tf32`. Terms q and q + 4 of a product are what lies at 2q and 2q + 1.
struct Lane {
  int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  // Rows g and g + 8 of a left operand, whose terms are the columns from c on.
  template <int kStride>
  __device__ __forceinline__ Halves<4> rows(const float (*x)[kStride], int c) const {
    float upper[2], lower[2];
    load(upper, &x[g][c + 2 * q]);
    load(lower, &x[g + 8][c + 2 * q]);
    const float a[4] = {upper[0], lower[0], upper[1], lower[1]};
    return Halves<4>(a);
  }
  // A right operand from its transpose: row g is the result's column g.
  template <int kStride>
  __device__ __forceinline__ Halves<2> transposed(const float (*x)[kStride], int c) const {
    float b[2];
    load(b, &x[g][c + 2 * q]);
    return Halves<2>(b);
  }
  // A right operand: column c + g, rows 2q and 2q + 1.
  template <int kStride>
  __device__ __forceinline__ Halves<2> columns(const float (*x)[kStride], int c) const {
    const float b[2] = {x[2 * q][c + g], x[2 * q + 1][c + g]};
    return Halves<2>(b);
  }
  __device__ __forceinline__ float sum_of_row(float x) const {  // over the four lanes that share it
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};

// d += what tensor cores summed apart: they round towards 0, which would add up.
template <int N>
__device__ __forceinline__ void add_to(float (&d)[N][4], const float (&part)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] += part[j][i];
  }
}

using Terms = float[kSteps][kDeep + 8];

// scores_rc += x_r . y_c, of the 16 rows from `first` on, for kDeep terms; only for blocks of columns where `needed`.
template <class Needed>
__device__ __forceinline__ void add_scores(float (&scores)[kSteps / 8][4], const Terms& x, const Terms& y, int first,
                                           const Lane& own, const Needed& needed) {
  float part[kSteps / 8][4] = {};
#pragma unroll
  for (int c = 0; c < kDeep; c += 8) {
    const Halves<4> row = own.rows(x + first, c);
#pragma unroll
    for (int j = 0; j < kSteps / 8; ++j) {
      if (needed(j)) mma(part[j], row, own.transposed(y + 8 * j, c));
    }
  }
  add_to(scores, part);
}

// --- the gates ------------------------------------------------------------------------------------------------------

constexpr double kNothing = -1e30;  // for -inf, which would leave NaNs

__device__ __forceinline__ float log_sigmoid(float f) { return -softplus(-f); }

// m -> max(slope + m, least), a step or many of the recurrence.
struct Leap {
  double slope = 0, least = kNothing;
  __device__ __forceinline__ double of(double m) const { return larger(slope + m, least); }
  __device__ __forceinline__ Leap then(const Leap& o) const { return {slope + o.slope, o.of(least)}; }
};

// A warp is a head, and takes kOwn steps for each lane at a time.
template <int kOwn>
__global__ void __launch_bounds__(32)
    maximum(const float* i_, const float* f_, i64 L, i64 H, i64 P, float* m_, double* since_, float* beta_) {
  const int lane = threadIdx.x;
  const i64 head = (blockIdx.x / H) * L * H + blockIdx.x % H;
  const float root = 1 / sqrtf(static_cast<float>(P));
  double before = kNothing;  // m of the last step of the lanes' steps before
  for (i64 start = 0; start < L; start += 32 * kOwn) {
    float i[kOwn], log_f[kOwn];
    double m[kOwn], since[kOwn];
    const i64 first = start + lane * kOwn;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const i64 at = head + smaller(first + k, L - 1) * H;
      i[k] = read<1>(i_ + at).x[0], log_f[k] = read<1>(f_ + at).x[0];
    }
    Leap all;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) log_f[k] = log_sigmoid(log_f[k]), all = all.then({log_f[k], i[k]});
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int from = larger(lane - offset, 0);
      const Leap past{__shfl_sync(0xffffffffu, all.slope, from), __shfl_sync(0xffffffffu, all.least, from)};
      if (lane >= offset) all = past.then(all);
    }
    const double left = all.of(before), from_left = __shfl_sync(0xffffffffu, left, larger(lane - 1, 0));
    double walked = lane ? from_left : before;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) m[k] = walked = larger<double>(log_f[k] + walked, i[k]);
    double previous = lane ? from_left : before, sum = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      sum += larger(log_f[k] + previous - m[k], -1e4);  // whose decay is 0
      since[k] = sum, previous = m[k];
    }
    double total = sum;  // of the lanes so far that are of the same chunk
#pragma unroll
    for (int offset = 1; offset < kSteps / kOwn; offset *= 2) {
      const double past = __shfl_sync(0xffffffffu, total, larger(lane - offset, 0));
      if (lane % (kSteps / kOwn) >= offset) total += past;
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (first + k >= L) continue;
      const i64 at = head + (first + k) * H;
      m_[at] = static_cast<float>(m[k]);
      since_[at] = total - sum + since[k];
      beta_[at] = exp_of(i[k] - m[k]) * root;
    }
    before = __shfl_sync(0xffffffffu, walked, 31);
  }
}

// The gradient c_t of m_t, which is dm_t and, if step t + 1 keeps m_t, c_{t+1}: it is one of i_t, or of log f_t and
// m_{t-1}. Also from log f to f.
template <int kOwn>
__global__ void __launch_bounds__(32)
    maximum_backward(const float* dm_, const float* dg_, const float* i_, const float* f_, const float* m_, i64 L,
                     i64 H, float* di_, float* df_) {
  const int lane = threadIdx.x;
  const i64 head = (blockIdx.x / H) * L * H + blockIdx.x % H;
  float after = 0;  // what the steps behind give to m
  for (i64 start = (L - 1) / (32 * kOwn) * 32 * kOwn; start >= 0; start -= 32 * kOwn) {
    float dm[kOwn], f[kOwn];
    bool keeps[kOwn];
    const i64 first = start + lane * kOwn;
    float slope = 1, sum = 0;  // of the lane's steps: what they give is slope x + sum
#pragma unroll
    for (int k = kOwn - 1; k >= 0; --k) {
      const i64 t = smaller(first + k, L - 1), at = head + t * H;
      const bool there = first + k < L;
      f[k] = read<1>(f_ + at).x[0];
      const float before = read<1>(m_ + at - (t ? H : 0)).x[0];
      dm[k] = there ? read<1>(dm_ + at).x[0] : 0.f;
      keeps[k] = !there || (t > 0 && log_sigmoid(f[k]) + before > read<1>(i_ + at).x[0]);
      sum = keeps[k] ? sum + dm[k] : 0.f;
      slope = keeps[k] ? slope : 0.f;
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int from = smaller(lane + offset, 31);
      const float next_slope = __shfl_sync(0xffffffffu, slope, from), next_sum = __shfl_sync(0xffffffffu, sum, from);
      if (lane + offset < 32) sum += slope * next_sum, slope *= next_slope;
    }
    const float given = slope * after + sum, from_right = __shfl_sync(0xffffffffu, given, smaller(lane + 1, 31));
    float c = lane < 31 ? from_right : after;
#pragma unroll
    for (int k = kOwn - 1; k >= 0; --k) {
      c += dm[k];
      if (first + k < L) {
        const i64 at = head + (first + k) * H;
        df_[at] = (dg_[at] + (keeps[k] ? c : 0.f)) * sigmoid(-f[k]);
        di_[at] += keeps[k] ? 0.f : c;
      }
      if (!keeps[k]) c = 0;
    }
    after = __shfl_sync(0xffffffffu, given, 0);
  }
}

__device__ __forceinline__ float floor_of(float m) { return exp_(smaller(-m, 79.85f)); }  // `reference.floor`

// A warp is a row of h: of its numerator the gradient is scale dh, of n . q it is scale extra.
template <int kRows>
__global__ void __launch_bounds__(32 * kRows)
    through_h(const float* dh_, i64 dh_batch, i64 dh_token, i64 dh_head, const float* h_, const float* m_,
              const float* denominator_, i64 B, i64 L, i64 H, i64 P, double eps, float* scale, float* extra,
              float* dm) {
  const i64 row = static_cast<i64>(blockIdx.x) * kRows + threadIdx.x / 32;  // of fewer than 2^32
  const bool there = row < B * L * H;
  const i64 at = there ? row : 0;
  const unsigned heads = static_cast<unsigned>(H), token = static_cast<unsigned>(at) / heads;
  const unsigned b = token / static_cast<unsigned>(L), t = token - b * static_cast<unsigned>(L);
  const float* dh = dh_ + b * dh_batch + t * dh_token + (at - static_cast<i64>(token) * H) * dh_head;
  float sum = 0;
  for (i64 c = threadIdx.x % 32; c < P; c += 32) sum += dh[c] * h_[at * P + c];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (!there || threadIdx.x % 32) return;
  const float floor = floor_of(m_[at]), n = denominator_[at], least = static_cast<float>(eps);
  const float over = reciprocal(larger(fabsf(n), floor) + least);
  scale[at] = over;
  extra[at] = fabsf(n) > floor ? (n > 0 ? -sum : sum) : 0.f;
  dm[at] = -sum * over * least;
}

// --- the states -----------------------------------------------------------------------------------------------------

// Writes the state before each chunk; backward, from behind, the adjoint of the state after it. With end the last step:
//
//   S becomes exp(since_end) S + sum_s beta_s exp(since_end - since_s) k_s v_s^T,     n the same with 1 for v_s
//   D becomes exp(since_end) D + sum_t scale_t exp(since_t) q_t dh_t^T,               extra_t for dh_t
//
// A block has 48 rows and 48 columns of it, a warp 16 rows. It reads half of a chunk at a time.
constexpr int kHalf = kSteps / 2, kWidth = 2 * kWide;

template <bool kBackward, int V>
__global__ void __launch_bounds__(kWidth, 5)
    carry(const float* x_, i64 x_batch, i64 x_token, i64 x_head, const float* z_, i64 z_batch, i64 z_token, i64 z_head,
          const double* since_, const float* factor_, const float* extra_, i64 L, i64 H, i64 P, i64 tiles,
          float* states) {
  alignas(16) __shared__ float x[kHalf][kWide + 8], z[kHalf][kWide + 8];
  __shared__ float weight[kHalf], extra[kHalf], whole;
  const Lane own;
  const unsigned across = static_cast<unsigned>(tiles), task = blockIdx.x / across;
  const int row_tile = static_cast<int>(blockIdx.x % across), column_tile = static_cast<int>(task % across);
  const i64 head = task / across;
  const int top = row_tile * kWide, aside = column_tile * kWide, first = threadIdx.x / 32 * 16;
  const i64 chunks = (L + kSteps - 1) / kSteps;
  Piece<kHalf, kWide, kWidth, V> xs, zs;
  double since = 0, end = 0;
  float factor = 0, more = 0;
  const auto fetch = [&](int i) {
    const Chunk c(head, kBackward ? chunks - 1 - i / 2 : i / 2, L, H);
    const int begin = i % 2 * kHalf, count = c.count - begin, t = begin + static_cast<int>(threadIdx.x);
    const i64 start = c.start + begin;
    xs.fetch(x_ + c.b * x_batch + start * x_token + c.h * x_head + top, x_token, count, static_cast<int>(P) - top);
    zs.fetch(z_ + c.b * z_batch + start * z_token + c.h * z_head + aside, z_token, count, static_cast<int>(P) - aside);
    if (threadIdx.x < kHalf) {
      since = since_[c.at(t)], end = since_[c.at(kSteps - 1)];
      factor = t < c.count ? factor_[c.at(t)] : 0.f;
      more = kBackward ? extra_[c.at(t)] : 1.f;
    }
  };
  float S[kBlocks][4] = {}, n[2] = {};  // rows g (twice), g + 8 (twice) of columns 8 j + 2q and 8 j + 2q + 1
  fetch(0);
  for (int i = 0; i < 2 * chunks; ++i) {
    xs.put(x), zs.put(z);
    if (threadIdx.x < kHalf) {
      weight[threadIdx.x] = factor * exp_of(kBackward ? since : end - since);
      extra[threadIdx.x] = more;
      if (threadIdx.x == 0) whole = exp_of(end);
    }
    __syncthreads();
    if (i + 1 < 2 * chunks) fetch(i + 1);
    if (i % 2 == 0) {
      const Chunk c(head, kBackward ? chunks - 1 - i / 2 : i / 2, L, H);
      float* state = states + c.state(P);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const i64 r = top + first + own.g + 8 * k;
        if (r >= P) continue;
        float* at = state + r * P + aside + 2 * own.q;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          const float two[2] = {S[j][2 * k], S[j][2 * k + 1]};
          if (V > 1 && aside + 8 * j + 2 * own.q < P) write(at + 8 * j, two);
          if (V == 1 && aside + 8 * j + 2 * own.q < P) write_one(at + 8 * j, two[0]);
          if (V == 1 && aside + 8 * j + 2 * own.q + 1 < P) write_one(at + 8 * j + 1, two[1]);
        }
        if (column_tile == 0 && own.q == 0) state[P * P + r] = n[k];
      }
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) S[j][k] *= whole;
      }
      n[0] *= whole, n[1] *= whole;
    }
    float part[kBlocks][4] = {}, sums[2] = {};
#pragma unroll
    for (int s = 0; s < kHalf; s += 8) {
      const int one = s + own.q, two = one + 4, r = first + own.g;  // the terms
      const float a[4] = {x[one][r] * weight[one], x[one][r + 8] * weight[one], x[two][r] * weight[two],
                          x[two][r + 8] * weight[two]};
      const Halves<4> rows(a);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float b[2] = {z[one][8 * j + own.g], z[two][8 * j + own.g]};
        mma(part[j], rows, Halves<2>(b));
      }
      sums[0] += a[0] * extra[one] + a[2] * extra[two];
      sums[1] += a[1] * extra[one] + a[3] * extra[two];
    }
    add_to(S, part);
    n[0] += own.sum_of_row(sums[0]), n[1] += own.sum_of_row(sums[1]);
    __syncthreads();
  }
}

// --- all chunks at once ---------------------------------------------------------------------------------------------

// For each row r of a chunk, over the rows c from its start to r (backwards: from r to its end),
//
//   out_r = sum_c (x_r . y_c + e) left_r right_c exp(|since_r - since_c|) z_c + state_r,
//
//   out        x   y   z   e        left   right   state_r
//   h, kRead   q   k   v   0        1      beta    exp(since_r) S^T q_r,  divided by max(..) + eps
//   dq, kToQ   dh  v   k   extra_r  scale  beta    scale_r exp(since_r) (S dh_r + extra_r n)
//   dk, kToK   v   dh  q   extra_c  beta   scale   beta_r exp(since_end - since_r) (D v_r + D's n)
//   dv, kToV   k   q   dh  0        beta   scale   beta_r exp(since_end - since_r) D^T k_r
//
// A block has 48 columns of out. Of its columns, dq and dk write two more sums for `gates`, (2, tiles, B, L, H): those
// of q_r or k_r times state_r, and times out_r.
enum { kRead, kToQ, kToK, kToV };

template <int kOut, int V>
__global__ void __launch_bounds__(kThreads, 3)
    apply(const float* x_, i64 x_batch, i64 x_token, i64 x_head, const float* y_, i64 y_batch, i64 y_token, i64 y_head,
          const float* z_, i64 z_batch, i64 z_token, i64 z_head, const float* own_, i64 own_batch, i64 own_token,
          i64 own_head, const float* states, const double* since_, const float* beta_, const float* scale_,
          const float* extra_, const float* m_, i64 B, i64 L, i64 H, i64 P, i64 tiles, double eps, float* out_,
          float* denominator, float* sums) {
  constexpr bool kLater = kOut == kToK || kOut == kToV, kTurned = kOut == kToQ || kOut == kToK;
  union Work {  // one after the other
    struct {
      Terms x, y;
      float state[kTurned ? kWide : kDeep][kTurned ? kDeep + 8 : kWide + 4];
    } terms;
    float z[kSteps][kWide + 4];
  };
  alignas(16) __shared__ Work work;
  __shared__ double since[kSteps];
  __shared__ float left[kSteps], right[kSteps], extra[kSteps], of_n[kDeep];
  const Lane own;
  const unsigned across = static_cast<unsigned>(tiles), chunks = static_cast<unsigned>((L + kSteps - 1) / kSteps);
  const unsigned task = blockIdx.x / across;
  const int tile = static_cast<int>(blockIdx.x % across), aside = tile * kWide;
  const Chunk c(task / chunks, task % chunks, L, H);
  // Rows have unequally many columns: blocks give them to different schedulers.
  const int first = static_cast<int>((threadIdx.x / 32 + blockIdx.x) % 4) * 16;
  const auto needed = [&](int j) { return kLater ? 8 * j + 8 > first : 8 * j < first + 16; };
  const float* x = x_ + c.b * x_batch + c.start * x_token + c.h * x_head;
  const float* y = y_ + c.b * y_batch + c.start * y_token + c.h * y_head;
  const float* z = z_ + c.b * z_batch + c.start * z_token + c.h * z_head + aside;
  const float* state = states + c.state(P);
  const float* n = state + P * P;

  Piece<kSteps, kDeep, kThreads, V> xs, ys;
  Piece<kTurned ? kWide : kDeep, kTurned ? kDeep : kWide, kThreads, V> ss;
  float next_n = 0;
  const auto fetch = [&](int at) {
    const int there = static_cast<int>(P) - at, beside = static_cast<int>(P) - aside, t = threadIdx.x;
    xs.fetch(x + at, x_token, c.count, there);
    ys.fetch(y + at, y_token, c.count, there);
    if (kOut == kRead && threadIdx.x < kDeep) next_n = t < there ? read<1>(n + at + t).x[0] : 0.f;
    ss.fetch(kTurned ? state + aside * P + at : state + at * P + aside, P, kTurned ? beside : there,
             kTurned ? there : beside);
  };
  fetch(0);
  if (threadIdx.x < kSteps) {
    const int t = threadIdx.x;
    const bool there = t < c.count;
    since[t] = since_[c.at(t)];
    const float beta = there ? beta_[c.at(t)] : 0.f, scale = kOut == kRead ? 1.f : there ? scale_[c.at(t)] : 0.f;
    left[t] = kLater ? beta : scale;
    right[t] = kLater ? scale : beta;
    extra[t] = kTurned && there ? extra_[c.at(t)] : 0.f;
  }
  float scores[kSteps / 8][4] = {}, of_state[kBlocks][4] = {}, with_n[2] = {};
  for (int at = 0; at < P; at += kDeep) {
    xs.put(work.terms.x), ys.put(work.terms.y), ss.put(work.terms.state);
    if (kOut == kRead && threadIdx.x < kDeep) of_n[threadIdx.x] = next_n;
    __syncthreads();
    if (at + kDeep < P) fetch(at + kDeep);
    if (first < c.count) {
      add_scores(scores, work.terms.x, work.terms.y, first, own, needed);
      float part[kBlocks][4] = {};
#pragma unroll
      for (int k = 0; k < kDeep; k += 8) {
        const Halves<4> row = own.rows(work.terms.x + first, k);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          mma(part[j], row,
              kTurned ? own.transposed(work.terms.state + 8 * j, k) : own.columns(work.terms.state + k, 8 * j));
        }
        if (kOut == kRead) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int term = k + 2 * own.q + i;
            with_n[0] += work.terms.x[first + own.g][term] * of_n[term];
            with_n[1] += work.terms.x[first + own.g + 8][term] * of_n[term];
          }
        }
      }
      add_to(of_state, part);
    }
    __syncthreads();
  }
  Piece<kSteps, kWide, kThreads, V> zs;
  zs.fetch(z, z_token, c.count, static_cast<int>(P) - aside);

  float factor[2], sum[2] = {};  // of rows g and g + 8
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = first + own.g + 8 * i;
    factor[i] = left[r] * exp_of(kLater ? since[kSteps - 1] - since[r] : since[r]);
  }
#pragma unroll
  for (int j = 0; j < kSteps / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + own.g + i / 2 * 8, at = 8 * j + 2 * own.q + i % 2;
      const bool pair = kLater ? at >= r : at <= r;
      const double distance = kLater ? since[at] - since[r] : since[r] - since[at];
      const float weight = pair ? left[r] * right[at] * exp_of(distance) : 0.f;
      scores[j][i] = (scores[j][i] + extra[kLater ? at : r]) * weight;
      sum[i / 2] += scores[j][i];
    }
  }
  zs.put(work.z);
  __syncthreads();
  float out[kBlocks][4] = {};
#pragma unroll
  for (int j = 0; j < kSteps / 8; ++j) {
    if (!needed(j)) continue;
    const float a[4] = {scores[j][0], scores[j][2], scores[j][1], scores[j][3]};
    const Halves<4> weights(a);
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) mma(out[k], weights, own.columns(work.z + 8 * j, 8 * k));
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = first + own.g + 8 * i;
    const i64 at = c.at(r);
    float over = 1, products[2] = {};
    if (kOut == kRead) {
      const float with_q = own.sum_of_row(sum[i] + factor[i] * with_n[i]);
      over = reciprocal(larger(fabsf(with_q), floor_of(m_[at])) + static_cast<float>(eps));
      if (denominator && tile == 0 && own.q == 0 && r < c.count) denominator[at] = with_q;
    }
    const float* row = own_ + c.b * own_batch + (c.start + smaller(r, c.count - 1)) * own_token + c.h * own_head;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int column = aside + 8 * j + 2 * own.q + k;
        if (column >= P) continue;
        float& x = out[j][2 * i + k];
        float before = of_state[j][2 * i + k];
        if (kTurned) before += (kOut == kToQ ? extra[r] : 1.f) * n[column];
        x = (x + factor[i] * before) * over;
        if (kTurned) products[0] += row[column] * factor[i] * before, products[1] += row[column] * x;
      }
      const float two[2] = {out[j][2 * i], out[j][2 * i + 1]};
      const int column = aside + 8 * j + 2 * own.q;
      float* to = out_ + at * P + column;
      if (r >= c.count) continue;
      if (V > 1 && column < P) write(to, two);
      if (V == 1 && column < P) write_one(to, two[0]);
      if (V == 1 && column + 1 < P) write_one(to + 1, two[1]);
    }
    if (kTurned) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float total = own.sum_of_row(products[k]);
        if (own.q == 0 && r < c.count) sums[(k * tiles + tile) * B * L * H + at] = total;
      }
    }
  }
}

// The gradient of g_j, and of i_s apart from that through m. The first is the sum of all that decays by exp(g_j), each
// times its gradient: none of the terms is without g_j, so none has to cancel.
//
//   from the state to a step t >= j         q_t . (state_t of dq)
//   from a step s < j to the state          k_s . (state_s of dk)
//   through the chunk                       exp(since_end) <S, D>, n with n
//   from a step s < j to a step t >= j      the product of the two scores and of all weights
//
// The second is k_s . dk_s. A block is a chunk.
template <int V>
__global__ void __launch_bounds__(kThreads, 3)
    gates(const float* q_, i64 q_batch, i64 q_token, i64 q_head, const float* k_, i64 k_batch, i64 k_token, i64 k_head,
          const float* v_, i64 v_batch, i64 v_token, i64 v_head, const float* dh_, i64 dh_batch, i64 dh_token,
          i64 dh_head, const float* states, const float* adjoints, const double* since_, const float* beta_,
          const float* scale_, const float* extra_, const float* of_q, const float* of_k, i64 B, i64 L, i64 H, i64 P,
          i64 tiles, float* dg, float* di) {
  union Work {  // one after the other
    struct {
      Terms x, y;
    } terms;
    float pairs[kSteps][kSteps + 1];
  };
  alignas(16) __shared__ Work work;
  __shared__ double since[kSteps];
  __shared__ float scale[kSteps], beta[kSteps], extra[kSteps], reads[kSteps], writes[kSteps], parts[kThreads / 32];
  const Lane own;
  const unsigned chunks = static_cast<unsigned>((L + kSteps - 1) / kSteps);
  const Chunk c(blockIdx.x / chunks, blockIdx.x % chunks, L, H);
  const int first = static_cast<int>((threadIdx.x / 32 + blockIdx.x) % 4) * 16, t = threadIdx.x;
  const auto needed = [&](int j) { return 8 * j < first + 16; };
  if (t < kSteps) {
    const bool there = t < c.count;
    since[t] = since_[c.at(t)];
    beta[t] = there ? beta_[c.at(t)] : 0.f, scale[t] = there ? scale_[c.at(t)] : 0.f;
    extra[t] = there ? extra_[c.at(t)] : 0.f;
    float sums[3] = {};
    for (i64 tile = 0; tile < tiles; ++tile) {
      sums[0] += of_q[tile * B * L * H + c.at(t)];
      sums[1] += of_k[tile * B * L * H + c.at(t)];
      sums[2] += of_k[(tiles + tile) * B * L * H + c.at(t)];
    }
    reads[t] = there ? sums[0] : 0.f, writes[t] = there ? sums[1] : 0.f;
    if (there) di[c.at(t)] = sums[2];
  }
  float together = 0;
  const float* S = states + c.state(P);
  const float* D = adjoints + c.state(P);
  for (i64 i = t * V; i < (P + 1) * P; i += kThreads * V) {
    const Pack<float, V> x = read<V>(S + i), y = read<V>(D + i);
#pragma unroll
    for (int k = 0; k < V; ++k) together += x.x[k] * y.x[k];
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2) together += __shfl_xor_sync(0xffffffffu, together, offset);
  if (t % 32 == 0) parts[t / 32] = together;

  float scores[2][kSteps / 8][4] = {};  // q . k, dh . v
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const float* x = pass ? dh_ + c.b * dh_batch + c.start * dh_token + c.h * dh_head
                          : q_ + c.b * q_batch + c.start * q_token + c.h * q_head;
    const float* y = pass ? v_ + c.b * v_batch + c.start * v_token + c.h * v_head
                          : k_ + c.b * k_batch + c.start * k_token + c.h * k_head;
    Piece<kSteps, kDeep, kThreads, V> xs, ys;
    const auto fetch = [&](int at) {
      xs.fetch(x + at, pass ? dh_token : q_token, c.count, static_cast<int>(P) - at);
      ys.fetch(y + at, pass ? v_token : k_token, c.count, static_cast<int>(P) - at);
    };
    fetch(0);
    for (int at = 0; at < P; at += kDeep) {
      xs.put(work.terms.x), ys.put(work.terms.y);
      __syncthreads();
      if (at + kDeep < P) fetch(at + kDeep);
      add_scores(scores[pass], work.terms.x, work.terms.y, first, own, needed);
      __syncthreads();
    }
  }
#pragma unroll
  for (int j = 0; j < kSteps / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = first + own.g + i / 2 * 8, s = 8 * j + 2 * own.q + i % 2;
      const float weight = s < r ? scale[r] * beta[s] * exp_of(since[r] - since[s]) : 0.f;
      work.pairs[r][s] = scores[0][j][i] * (scores[1][j][i] + extra[r]) * weight;
    }
  }
  __syncthreads();
  if (t < kSteps) {  // pairs_tj becomes the sum over s < j
    float sum = 0;
    for (int j = 0; j < kSteps; ++j) {
      const float next = sum + work.pairs[t][j];
      work.pairs[t][j] = sum, sum = next;
    }
  }
  __syncthreads();
  if (t < c.count) {
    float sum = exp_of(since[kSteps - 1]) * (parts[0] + parts[1] + parts[2] + parts[3]);
    for (int step = 0; step < kSteps; ++step) sum += step >= t ? reads[step] + work.pairs[step][t] : writes[step];
    dg[c.at(t)] = sum;
  }
}
