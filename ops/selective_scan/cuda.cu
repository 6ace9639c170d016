// Selective scan on CUDA, forward and backward. A thread is a channel, a block up to 128 channels of a group of a batch
// item and one segment of its steps, which it walks in chunks of kChunk. What a step shares between channels (B, C, the
// low-rank step size) is staged in shared memory, chunk by chunk.
//
//   delta = softplus(dt_weight dt + dt_bias);  h_t = exp(delta A) h_{t-1} + delta B_t u_t;  y_t = C_t h_t + D u_t
//
// Where batch x groups x channels do not fill the machine, the steps are cut into several segments: `ends` scans each
// from zero, `carry` joins their ends one after the other, and the full pass starts each segment from the state so
// found. The decay of a whole segment is exp(A sum delta), so that is all that must be kept of it. The adjoint does the
// same backwards.
//
// Layouts as on the CPU: A (G, N, D) in units of log2(e), dt_weight (G, R, D), states before each chunk (B, G, chunks,
// N, D).

#include "device.cuh"

constexpr int kChunk = LINZOO_CHUNK;
constexpr int kAtOnce = 4;  // steps

// The tokens of a chunk's steps, and rows of them in shared memory. Behind the last step the tokens are the last one's,
// the rows 0: such steps add nothing to what is summed, and what they put out is not written.
struct Chunk {
  int tokens[2][kChunk];  // of this chunk, and of the one that comes next
  static __device__ __forceinline__ int token(const Order& order, const Place& p, i64 start) {
    const i64 t = smaller(start + threadIdx.x % kChunk, p.end - 1);
    return static_cast<int>(order.token(p.b, p.g, larger(t, p.begin)));
  }
  __device__ __forceinline__ void keep(int parity, int token) {
    if (threadIdx.x < kChunk) tokens[parity][threadIdx.x] = token;
  }
  template <int K, class T, class S>
  __device__ __forceinline__ void stage(T (*out)[K], const Tokens<const S>& rows, int parity, int count) const {
    for (int i = threadIdx.x; i < kChunk * K; i += blockDim.x) {
      const T x = get<T>(read<1>(rows.at(tokens[parity][i / K]) + i % K).x);
      out[i / K][i % K] = i / K < count ? x : T(0);
    }
  }
};

// The step size of a channel: of the low-rank row `low`, or of its own value before softplus.
template <bool kSoftplus, int R, class T>
__device__ __forceinline__ T step_size(const T* low, const T* weight, T own, T bias) {
  T x = bias + own;
#pragma unroll
  for (int r = 0; r < R; ++r) x += weight[r] * low[r];
  return kSoftplus ? softplus(x) : x;
}

template <int K, class T>
__device__ __forceinline__ void load_column(T (&out)[K], const T* rows, const Place& p, i64 D, int count) {
#pragma unroll
  for (int i = 0; i < K; ++i) out[i] = p.active && rows && i < count ? rows[(p.g * count + i) * D + p.c] : T(0);
}

// Where a group's rows of channels go: written to `own`, or where groups are merged, added to `merged`.
template <class S, class T>
struct Sink {
  char* data;
  unsigned bytes;  // between tokens
  __device__ __forceinline__ Sink(S* own, i64 own_token, T* merged, i64 merged_token, bool merges)
      : data(merges ? reinterpret_cast<char*>(merged) : reinterpret_cast<char*>(own)),
        bytes(static_cast<unsigned>(merges ? merged_token * sizeof(T) : own_token * sizeof(S))) {}
  template <int V>
  __device__ __forceinline__ void put(int token, const T (&x)[V], bool merges) const {
    char* to = advance(data, token, bytes);
    if (merges) {
      add(reinterpret_cast<T*>(to), x);
    } else {
      write(reinterpret_cast<S*>(to), x);
    }
  }
};

// Whether A_n = n A_1 but for roundings, as where A = -exp(log n): Mamba's initial rates. Trained ones differ. Then
// exp(delta A_n) is the n-th power of exp(delta A_1), made by products: one special function for N states. Its relative
// error is n times the first's (16 x 2e-7), but state n also forgets n times as fast.
template <int N, class T>
__device__ __forceinline__ bool multiples(const T (&A)[N]) {
  bool all = true;
#pragma unroll
  for (int n = 1; n < N; ++n) {
    const T off = A[n] - (n + 1) * A[0];
    all = all && larger(off, -off) <= T(sizeof(T) == 8 ? -6e-16 : -3e-7) * A[n];
  }
  return all;
}

// Blocks of a multiprocessor, at least.
template <class T, int N, int R>
constexpr int kBlocks = sizeof(T) == 8 || 2 * N + R > 80 ? 1
                        : 2 * N + R > 44                 ? 4
                                                         : 5;

// kEnds: writes only the state at the segment's end when it begins at 0, and the sum of its step sizes.
// y of one group is written, of several groups that are merged is added to.
template <class S, class T, int N, int R, bool kSoftplus, bool kEnds>
__global__ void __launch_bounds__(kThreads, kBlocks<T, N, R>)
    forward(const S* u_, i64 u_batch, i64 u_token, i64 u_group, const S* dt_, i64 dt_batch, i64 dt_token, i64 dt_group,
            const S* B_, i64 B_batch, i64 B_token, i64 B_group, const S* C_, i64 C_batch, i64 C_token, i64 C_group,
            const T* A_, const T* skip_, const T* weight_, const T* bias_, const int* order_, i64 order_batch, i64 G,
            i64 D, i64 steps, i64 blocks, i64 segments, i64 segment_steps, T* boundary, T* sums, T* states, S* y_,
            i64 y_batch, i64 y_token, i64 y_group, T* merged) {
  constexpr int kLow = R ? R : 1;
  alignas(16) __shared__ T Bs[kChunk][N], Cs[kChunk][N], lows[kChunk][kLow];
  __shared__ Chunk chunk;
  const Place p(G, D, steps, blocks, segments, segment_steps);
  if (kEnds && p.segment == segments - 1) return;  // no segment begins where it ends
  const Order order{order_, order_batch, steps};
  const i64 c = p.active ? p.c : 0;
  const Tokens<const S> u(u_, p.b * u_batch + p.g * u_group + c, u_token);
  const Tokens<const S> dt(dt_, p.b * dt_batch + p.g * dt_group + (R ? 0 : c), dt_token);
  const Tokens<const S> B(B_, p.b * B_batch + p.g * B_group, B_token), C(C_, p.b * C_batch + p.g * C_group, C_token);
  const Sink<S, T> y(y_ + p.b * y_batch + p.g * y_group + c, y_token, merged + p.b * y_batch + c, y_token, merged);
  const i64 chunks = (steps + kChunk - 1) / kChunk;

  T A[N], h[N], weight[kLow], skip[1], bias[1], sum = 0;
  load_column(A, A_, p, D, N);
  load_column(weight, weight_, p, D, R);
  load_column(skip, skip_, p, D, 1);
  load_column(bias, bias_, p, D, 1);
#pragma unroll
  for (int n = 0; n < N; ++n) h[n] = !kEnds && boundary && p.active ? boundary[(p.index * N + n) * D + p.c] : T(0);

  const bool powers = N >= 4 && of_warp(multiples(A) || !p.active);
  int parity = 0;
  chunk.keep(0, chunk.token(order, p, p.begin));
  __syncthreads();
  for (i64 start = p.begin; start < p.end; start += kChunk, parity ^= 1) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start)),
              next = chunk.token(order, p, start + kChunk);
    Pack<S, 1> us[kAtOnce], own[kAtOnce];
    const auto fetch = [&](int first) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        us[i] = read<1>(u.at(chunk.tokens[parity][first + i]));
        if (!R) own[i] = read<1>(dt.at(chunk.tokens[parity][first + i]));
      }
    };
    fetch(0);
    chunk.stage<N>(Bs, B, parity, count);
    if (!kEnds) chunk.stage<N>(Cs, C, parity, count);
    if (R) chunk.stage<kLow>(lows, dt, parity, count);
    __syncthreads();
    chunk.keep(parity ^ 1, next);
    if (!kEnds && states && p.active) {
#pragma unroll
      for (int n = 0; n < N; ++n) states[(((p.b * G + p.g) * chunks + start / kChunk) * N + n) * D + p.c] = h[n];
    }
    const auto walk = [&](bool of_powers) {  // a constant: the code of both is apart
#pragma unroll 1
      for (int first = 0; first < kChunk; first += kAtOnce) {
        T x[kAtOnce], delta[kAtOnce], out[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          x[i] = get<T>(us[i].x);
          out[i] = skip[0] * x[i];
          delta[i] = step_size<kSoftplus, R>(lows[first + i], weight, R ? T(0) : get<T>(own[i].x), bias[0]);
          sum += delta[i];
        }
        if (first + kAtOnce < kChunk) fetch(first + kAtOnce);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const T input = delta[i] * x[i];
          T a[N];  // exp(delta A)
#pragma unroll
          for (int n = 0; n < N; ++n) {
            a[n] = of_powers && n ? a[(n - 1) / 2] * a[n / 2] : exp2_(delta[i] * A[n]);
            h[n] = a[n] * h[n] + input * Bs[first + i][n];
            if (!kEnds) out[i] += h[n] * Cs[first + i][n];
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce && !kEnds; ++i) {
          const T one[1] = {out[i]};
          if (p.active && first + i < count) y.put(chunk.tokens[parity][first + i], one, merged);
        }
      }
    };
    if (powers) {
      walk(true);
    } else {
      walk(false);
    }
    __syncthreads();
  }
  if (kEnds && p.active) {
#pragma unroll
    for (int n = 0; n < N; ++n) boundary[(p.index * N + n) * D + p.c] = h[n];
    sums[p.index * D + p.c] = sum;
  }
}

// What the adjoint state is at the segment's first step, decayed by it, when nothing comes from behind the segment; and
// the sum of the step sizes.
template <class S, class T, int N, int R, bool kSoftplus>
__global__ void __launch_bounds__(kThreads)
    adjoint_ends(const S* dy_, i64 dy_batch, i64 dy_token, i64 dy_group, const S* dt_, i64 dt_batch, i64 dt_token,
                 i64 dt_group, const S* C_, i64 C_batch, i64 C_token, i64 C_group, const T* A_, const T* weight_,
                 const T* bias_, const int* order_, i64 order_batch, i64 G, i64 D, i64 steps, i64 blocks, i64 segments,
                 i64 segment_steps, T* boundary, T* sums) {
  constexpr int kLow = R ? R : 1;
  alignas(16) __shared__ T Cs[kChunk][N], lows[kChunk][kLow];
  __shared__ Chunk chunk;
  const Place p(G, D, steps, blocks, segments, segment_steps);
  if (p.segment == 0) return;  // no segment ends where it begins
  const Order order{order_, order_batch, steps};
  const i64 c = p.active ? p.c : 0, last = p.begin + (p.end - p.begin - 1) / kChunk * kChunk;
  const Tokens<const S> dy(dy_, p.b * dy_batch + p.g * dy_group + c, dy_token);
  const Tokens<const S> dt(dt_, p.b * dt_batch + p.g * dt_group + (R ? 0 : c), dt_token);
  const Tokens<const S> C(C_, p.b * C_batch + p.g * C_group, C_token);

  T A[N], carry[N] = {}, weight[kLow], bias[1], sum = 0;
  load_column(A, A_, p, D, N);
  load_column(weight, weight_, p, D, R);
  load_column(bias, bias_, p, D, 1);
  int parity = 0;
  chunk.keep(0, chunk.token(order, p, last));
  __syncthreads();
  for (i64 start = last; start >= p.begin; start -= kChunk, parity ^= 1) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start)),
              next = chunk.token(order, p, start - kChunk);
    Pack<S, 1> dys[kChunk], own[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      dys[i] = read<1>(dy.at(chunk.tokens[parity][i]));
      if (!R) own[i] = read<1>(dt.at(chunk.tokens[parity][i]));
    }
    chunk.stage<N>(Cs, C, parity, count);
    if (R) chunk.stage<kLow>(lows, dt, parity, count);
    __syncthreads();
    chunk.keep(parity ^ 1, next);
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const T delta = step_size<kSoftplus, R>(lows[i], weight, R ? T(0) : get<T>(own[i].x), bias[0]);
      sum += delta;
#pragma unroll
      for (int n = 0; n < N; ++n) carry[n] = exp2_(delta * A[n]) * (carry[n] + get<T>(dys[i].x) * Cs[i][n]);
    }
    __syncthreads();
  }
  if (!p.active) return;
#pragma unroll
  for (int n = 0; n < N; ++n) boundary[(p.index * N + n) * D + p.c] = carry[n];
  sums[p.index * D + p.c] = sum;
}

// Joins the segments: `boundary` (B, G, segments, N, D) becomes what each segment begins with (kReverse: ends with).
template <class T, bool kReverse>
__global__ void __launch_bounds__(kThreads)
    carry(T* boundary, const T* sums, const T* A, i64 B, i64 G, i64 N, i64 D, i64 segments) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= B * G * N * D) return;
  const i64 d = i % D, n = i / D % N, bg = i / (D * N);
  const T rate = A[(bg % G * N + n) * D + d];
  T h = 0;
  constexpr int kAtOnce = 8;  // segments
  for (i64 first = 0; first < segments; first += kAtOnce) {
    T end[kAtOnce], sum[kAtOnce];
    const auto segment = [&](i64 k) { return bg * segments + (kReverse ? segments - 1 - k : k); };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const i64 k = segment(smaller(first + i, segments - 1));
      end[i] = boundary[(k * N + n) * D + d];
      sum[i] = sums[k * D + d];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= segments) break;
      boundary[(segment(first + i) * N + n) * D + d] = h;
      h = exp2_(rate * sum[i]) * h + end[i];
    }
  }
}

// The sum over a block's channels of what its warps have each summed.
template <int kRows, class T>
__device__ __forceinline__ T over_warps(const T (*parts)[kRows][33], int row, int lane) {
  T sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp < static_cast<int>(blockDim.x) / 32) sum += parts[warp][row][lane];
  }
  return sum;
}

// Sums over channels go to (block of channels, B, L, G, -), sums over steps to (B, segments, G, -, D).
template <class S, class T, int N, int R, bool kSoftplus>
__global__ void __launch_bounds__(kThreads, 3)
    backward(const S* dy_, i64 dy_batch, i64 dy_token, i64 dy_group, const S* u_, i64 u_batch, i64 u_token, i64 u_group,
             const S* dt_, i64 dt_batch, i64 dt_token, i64 dt_group, const S* B_, i64 B_batch, i64 B_token, i64 B_group,
             const S* C_, i64 C_batch, i64 C_token, i64 C_group, const T* A_, const T* skip_, const T* weight_,
             const T* bias_, const int* order_, i64 order_batch, i64 batch, i64 L, i64 G, i64 D, i64 steps, i64 blocks,
             i64 segments, i64 segment_steps, T* boundary, const T* states, S* du, T* merged, S* ddt, T* dA_, T* dB,
             T* dC, T* dskip_, T* dlow, T* dweight_, T* dbias_) {
  constexpr int kLow = R ? R : 1, kRows = N + (R + 1) / 2;
  __shared__ T Bs[kChunk][N], Cs[kChunk][N], lows[kChunk][kLow], parts[kThreads / 32][kRows][33];
  __shared__ Chunk chunk;
  const Place p(G, D, steps, blocks, segments, segment_steps);
  const Order order{order_, order_batch, steps};
  const i64 c = p.active ? p.c : 0, last = p.begin + (p.end - p.begin - 1) / kChunk * kChunk;
  const Tokens<const S> dy(dy_, p.b * dy_batch + p.g * dy_group + c, dy_token);
  const Tokens<const S> u(u_, p.b * u_batch + p.g * u_group + c, u_token);
  const Tokens<const S> dt(dt_, p.b * dt_batch + p.g * dt_group + (R ? 0 : c), dt_token);
  const Tokens<const S> B(B_, p.b * B_batch + p.g * B_group, B_token), C(C_, p.b * C_batch + p.g * C_group, C_token);
  const Sink<S, T> dx(du + (p.b * L * G + p.g) * D + c, G * D, merged + p.b * L * D + c, D, merged);
  const i64 chunks = (steps + kChunk - 1) / kChunk, block = blockIdx.x % blocks;

  // A state's rate, gradient and adjoint are kept in global memory, in the cache: the loop over states is no code per
  // state. So are the weights of low-rank step sizes and their gradients: that loop wants the registers.
  const i64 bsg = (p.b * segments + p.segment) * G + p.g;
  T skip[1], bias[1], dskip = 0, dbias = 0;
  load_column(skip, skip_, p, D, 1);
  load_column(bias, bias_, p, D, 1);
  for (int n = 0; n < N && p.active; ++n) dA_[(bsg * N + n) * D + c] = 0;
  for (int r = 0; r < R && p.active; ++r) dweight_[(bsg * R + r) * D + c] = 0;
  int parity = 0;
  chunk.keep(0, chunk.token(order, p, last));
  __syncthreads();
  for (i64 start = last; start >= p.begin; start -= kChunk, parity ^= 1) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start)),
              next = chunk.token(order, p, start - kChunk);
    Pack<S, 1> us_[kChunk], dys_[kChunk], own[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      us_[i] = read<1>(u.at(chunk.tokens[parity][i]));
      dys_[i] = read<1>(dy.at(chunk.tokens[parity][i]));
      if (!R) own[i] = read<1>(dt.at(chunk.tokens[parity][i]));
    }
    chunk.stage<N>(Bs, B, parity, count);
    chunk.stage<N>(Cs, C, parity, count);
    if (R) chunk.stage<kLow>(lows, dt, parity, count);
    __syncthreads();
    chunk.keep(parity ^ 1, next);
    // Steps behind the last, and channels that are none, have dy = u = delta = 0: they change nothing.
    // input: delta u. u itself is read again behind the loop, which wants the registers.
    T input[kChunk], dys[kChunk], delta[kChunk], dinput[kChunk] = {}, ddelta[kChunk] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) delta[i] = bias[0] + (R ? T(0) : get<T>(own[i].x));
#pragma unroll 4
    for (int r = 0; r < R; ++r) {
      const T w = weight_[(p.g * R + r) * D + c];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) delta[i] += w * lows[i][r];
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool counts = p.active && i < count;
      dys[i] = counts ? get<T>(dys_[i].x) : T(0);
      delta[i] = !counts ? T(0) : kSoftplus ? softplus(delta[i]) : delta[i];
      input[i] = counts ? delta[i] * get<T>(us_[i].x) : T(0);
    }
#pragma unroll 1
    for (int n = 0; n < N; ++n) {
      const i64 state = n * D + c;
      T* adjoint = boundary + p.index * N * D + state;
      const T rate = A_[p.g * N * D + state];
      T carried = p.active ? *adjoint : T(0), dA = 0;
      T h[kChunk + 1], sums[32];  // sums: dB of each step, then dC
      h[0] = p.active ? states[(((p.b * G + p.g) * chunks + start / kChunk) * N + n) * D + p.c] : T(0);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        h[i + 1] = exp2_(delta[i] * rate) * h[i] + input[i] * Bs[i][n];
      }
#pragma unroll
      for (int i = kChunk - 1; i >= 0; --i) {
        sums[kChunk + i] = dys[i] * h[i + 1];
        carried += dys[i] * Cs[i][n];
        sums[i] = carried * input[i];
        dinput[i] += carried * Bs[i][n];
        carried *= exp2_(delta[i] * rate);
        const T through_decay = carried * h[i];
        ddelta[i] += through_decay * rate;
        dA += through_decay * delta[i];
      }
      if (p.active) *adjoint = carried, dA_[(bsg * N) * D + state] += dA;
      const T sum = warp_sums(sums);
      parts[threadIdx.x / 32][n][threadIdx.x % 32] = sum;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) us_[i] = read<1>(u.at(chunk.tokens[parity][i]));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const T x = get<T>(us_[i].x);
      // A counts in units of log2(e); d softplus(x) / dx = 1 - exp(-softplus(x))
      const T slope = kSoftplus ? one_less_exp(delta[i]) : T(1);
      ddelta[i] = (ddelta[i] * T(0.6931471805599453) + dinput[i] * x) * slope;
      if (!p.active || i >= count) {
        ddelta[i] = 0;
        continue;
      }
      dskip += dys[i] * x;
      dbias += ddelta[i];
      const int token = chunk.tokens[parity][i];
      const T dxs[1] = {dinput[i] * delta[i] + skip[0] * dys[i]};
      dx.put(token, dxs, merged);
      if (!R) put(ddt + ((p.b * L + token) * G + p.g) * D + p.c, ddelta[i]);
    }
#pragma unroll 2
    for (int first = 0; first < R; first += 2) {
      T sums[32];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int r = smaller(first + k, R - 1);
        const i64 at = r * D + c;
        const T w = first + k < R && p.active ? weight_[p.g * R * D + at] : T(0);
        T dw = 0;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          sums[k * kChunk + i] = ddelta[i] * w;
          dw += ddelta[i] * lows[i][r];
        }
        if (first + k < R && p.active) dweight_[bsg * R * D + at] += dw;
      }
      const T sum = warp_sums(sums);
      parts[threadIdx.x / 32][N + first / 2][threadIdx.x % 32] = sum;
    }
    __syncthreads();
    const i64 tokens = (block * batch + p.b) * L;
    for (int i = threadIdx.x; i < count * (2 * N + R); i += blockDim.x) {
      const int step = i / (2 * N + R), k = i % (2 * N + R), r = k - 2 * N;
      const i64 row = (tokens + chunk.tokens[parity][step]) * G + p.g;
      const bool of_C = k >= N && r < 0;
      const int part = r < 0 ? k - of_C * N : N + r / 2, side = r < 0 ? of_C : r % 2;
      T* to = r < 0 ? (of_C ? dC : dB) + row * N + part : dlow + row * R + r;
      write_one(to, over_warps(parts, part, side * kChunk + step));
    }
    __syncthreads();
  }
  if (!p.active) return;
  dskip_[bsg * D + p.c] = dskip;
  dbias_[bsg * D + p.c] = dbias;
}

// --- one state a channel ---------------------------------------------------------------------------------------------
//
// A block walks the steps in spans. Of a span a thread has V channels and kOwn steps: `kLanes` threads are neighbours
// in the channels, kSlices in the steps. Each scans its steps from zero; a thread per channel joins the slices; then
// each adds what comes from the steps before its own, or behind them.

constexpr int kOwn = 4;

// What the steps of a span share between channels: kColumns low-rank step sizes, B and C, one behind the other.
template <class T, int kLanes, int kColumns>
struct Span {
  static constexpr int kSlices = kThreads / kLanes, kSteps = kSlices * kOwn, kPitch = kSteps + 4;
  alignas(16) T columns[kColumns][kPitch];
  alignas(16) int tokens[2][kSteps];  // of this span, and of the one that comes next

  // The token of step `threadIdx.x`; behind the last step the last one's, whose values count nothing.
  static __device__ __forceinline__ int token(const Order& order, const Place& p, i64 start) {
    const i64 t = smaller(start + threadIdx.x % kSteps, p.end - 1);
    return static_cast<int>(order.token(p.b, p.g, larger(t, p.begin)));
  }
  __device__ __forceinline__ void keep(int parity, int token) {
    if (threadIdx.x < kSteps) tokens[parity][threadIdx.x] = token;
  }
  // Column k = first + threadIdx.x % 8, but for an offset of `first`: rank k of `low`, then B, then C. Where all eight
  // are ranks, that is one pointer for every `first`.
  template <int R, class S>
  static __device__ __forceinline__ Tokens<S> column(const Tokens<S>& low, const Tokens<S>& B, const Tokens<S>& C,
                                                     int first) {
    const int lane = threadIdx.x % 8, k = smaller(first + lane, kColumns - 1);
    const bool rank = first + 8 <= R || k < R;
    Tokens<S> out = rank ? low : k == R ? B : C;
    out.data += rank ? lane : -first;
    return out;
  }
  static constexpr int kAtOnce = kThreads / 8, kRounds = kSteps / kAtOnce;  // 8 threads a step
  template <int R, class S>
  __device__ __forceinline__ void stage(const Tokens<const S>& low, const Tokens<const S>& B, const Tokens<const S>& C,
                                        int parity, int count) {
    const int row = threadIdx.x / 8;
    Pack<S, 1> values[(kColumns + 7) / 8][kRounds];
#pragma unroll
    for (int first = 0; first < kColumns; first += 8) {
      const auto from = column<R>(low, B, C, first);
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        values[first / 8][i] = read<1>(from.at(tokens[parity][i * kAtOnce + row]) + first);
      }
    }
#pragma unroll
    for (int first = 0; first < kColumns; first += 8) {
      const int k = first + threadIdx.x % 8;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int step = i * kAtOnce + row;
        if (k < kColumns) columns[k][step] = step < count ? get<T>(values[first / 8][i].x) : T(0);
      }
    }
  }
  template <int R>
  __device__ __forceinline__ void put_back(const T (*found)[kPitch], const Tokens<T>& low, const Tokens<T>& B,
                                           const Tokens<T>& C, int parity, int count) const {
#pragma unroll
    for (int first = 0; first < kColumns; first += 8) {
      const int k = first + threadIdx.x % 8;
      const auto to = column<R>(low, B, C, first);
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int step = i * kAtOnce + threadIdx.x / 8;
        if (k < kColumns && step < count) write_one(to.at(tokens[parity][step]) + first, found[k][step]);
      }
    }
  }
};

// What a thread of a block for one state works on.
template <int kLanes, int V>
struct Corner {
  static constexpr int kWidth = kLanes * V;  // channels of a block
  int lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes, own = slice * kOwn;
  i64 first, c;  // the block's first channel and the thread's: threads behind the last repeat it
  bool active;
  __device__ __forceinline__ Corner(i64 D, i64 blocks)
      : first(blockIdx.x % static_cast<unsigned>(blocks) * kWidth),
        c(smaller(first + lane * V, D - V)),
        active(c == first + lane * V) {}
};

template <int V, class T>
__device__ __forceinline__ void load_channels(T (&out)[V], const T* values, i64 at) {
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = T(0);
  if (values) unpack(out, read<V>(values + at));
}

// Weights of low-rank step sizes, for a block: in shared memory where they fit beside the rest, else read where they
// lie.
template <class T, int R, int V, int kLanes, bool kShared>
struct Weights {
  static constexpr int kWidth = kLanes * V;
  alignas(16) T rows[kShared && R ? R : 1][kWidth];
  __device__ __forceinline__ void stage(const T* weight, const Corner<kLanes, V>& at, i64 D) {
    for (int i = threadIdx.x; kShared && i < R * kWidth; i += kThreads) {
      rows[i / kWidth][i % kWidth] = weight[i / kWidth * D + smaller(at.first + i % kWidth, D - 1)];
    }
  }
  // Rank r of V channels from the c-th of the block's on, whose first is `first`.
  __device__ __forceinline__ void row(T (&out)[V], int r, const T* weight, int c, i64 first, i64 D) const {
    if (kShared) {
      load(out, &rows[r][c]);
    } else {
      unpack(out, read<V>(weight + r * D + smaller(first + c, D - V)));
    }
  }
};

// The step sizes of a thread: of the low-rank rows at `low` with `weights(w, r)`, or of its own values before softplus,
// `delta`.
template <bool kSoftplus, int R, int kUnroll, int kPitch, int V, class T, class W>
__device__ __forceinline__ void step_sizes(T (&delta)[kOwn][V], const T (*low)[kPitch], const W& weights,
                                           const T* bias_, i64 at) {
  T bias[V];
  load_channels(bias, bias_, at);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) delta[i][v] = R ? bias[v] : delta[i][v] + bias[v];
  }
#pragma unroll kUnroll
  for (int r = 0; r < R; ++r) {
    T x[kOwn], w[V];
    load(x, low[r]);
    weights(w, r);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) delta[i][v] += x[i] * w[v];
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) delta[i][v] = kSoftplus ? softplus(delta[i][v]) : delta[i][v];
  }
}

// Sums of a slice's steps over the threads that share it, to `out`, a column of a span.
template <int kLanes, class T, class At>
__device__ __forceinline__ void span_sums(T* out, const T (&parts)[kOwn], const At& at) {
  const T sum = warp_sums<kOwn, kLanes / 2>(parts);
  if (at.lane % (kLanes / kOwn) == 0) out[at.own + at.lane * kOwn / kLanes] = sum;
}

// As `forward`, for N = 1. A token's rows must lie less than 2^32 bytes apart, and V channels be aligned.
template <class S, class T, int R, int V, int kLanes, bool kSoftplus, bool kEnds>
__global__ void __launch_bounds__(kThreads, 6)
    forward_one(const S* __restrict__ u_, i64 u_batch, i64 u_token, i64 u_group, const S* __restrict__ dt_,
                i64 dt_batch, i64 dt_token, i64 dt_group, const S* __restrict__ B_, i64 B_batch, i64 B_token,
                i64 B_group, const S* __restrict__ C_, i64 C_batch, i64 C_token, i64 C_group, const T* __restrict__ A_,
                const T* __restrict__ skip_, const T* __restrict__ weight_, const T* __restrict__ bias_,
                const int* __restrict__ order_, i64 order_batch, i64 G, i64 D, i64 steps, i64 blocks, i64 segments,
                i64 segment_steps, T* __restrict__ boundary, T* __restrict__ sums, T* __restrict__ states,
                S* __restrict__ y_, i64 y_batch, i64 y_token, i64 y_group, T* __restrict__ merged) {
  constexpr int kColumns = R + 1 + !kEnds, kWidth = kLanes * V;
  using Rows = Span<T, kLanes, kColumns>;
  __shared__ Rows span;
  __shared__ Weights<T, R, V, kLanes, R <= 64> weights;
  alignas(16) __shared__ T decays[Rows::kSlices][kWidth], ends[Rows::kSlices][kWidth];
  const Place p(G, D, steps, blocks, segments, segment_steps);
  if (kEnds && p.segment == segments - 1) return;  // no segment begins where it ends
  const Order order{order_, order_batch, steps};
  const Corner<kLanes, V> at(D, blocks);
  const Tokens<const S> u(u_, p.b * u_batch + p.g * u_group + at.c, u_token);
  const Tokens<const S> dt(dt_, p.b * dt_batch + p.g * dt_group + (R ? 0 : at.c), dt_token);
  const Tokens<const S> B(B_, p.b * B_batch + p.g * B_group, B_token), C(C_, p.b * C_batch + p.g * C_group, C_token);
  const Sink<S, T> y(y_ + p.b * y_batch + p.g * y_group + at.c, y_token, merged + p.b * y_batch + at.c, y_token,
                     merged);
  T A[V], skip[V];
  load_channels(A, A_, p.g * D + at.c);
  load_channels(skip, skip_, p.g * D + at.c);
  const T* weight = weight_ + p.g * R * D;
  weights.stage(weight, at, D);
  const auto weight_row = [&](T(&out)[V], int r) { weights.row(out, r, weight, at.lane * V, at.first, D); };
  // The channel that a thread joins, its rate, its state before a span, and the sum of its step sizes.
  const i64 channel = at.first + threadIdx.x;
  const bool joins = threadIdx.x < kWidth && channel < D;
  const T rate = joins ? A_[p.g * D + channel] : T(0);
  T state = !kEnds && boundary && joins ? boundary[p.index * D + channel] : T(0), total = 0;
  int parity = 0;
  span.keep(0, span.token(order, p, p.begin));
  __syncthreads();
  for (i64 start = p.begin; start < p.end; start += Rows::kSteps, parity ^= 1) {
    const int count = static_cast<int>(smaller<i64>(Rows::kSteps, p.end - start));
    const int next = span.token(order, p, start + Rows::kSteps);
    // Later: what a step puts out but for the state before the slice, and the weight of that state in it.
    T x[kOwn][V], delta[kOwn][V];
    Pack<S, V> us[kOwn], dts[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      us[i] = read<V>(u.at(span.tokens[parity][at.own + i]));
      if (!R) dts[i] = read<V>(dt.at(span.tokens[parity][at.own + i]));
    }
    span.template stage<R>(dt, B, C, parity, count);
    __syncthreads();
    span.keep(parity ^ 1, next);
#pragma unroll
    for (int i = 0; i < kOwn && !R; ++i) unpack(delta[i], dts[i]);
    const auto low = reinterpret_cast<const T(*)[Rows::kPitch]>(&span.columns[0][at.own]);
    step_sizes<kSoftplus, R, R && R <= 64 ? R : 2>(delta, low, weight_row, bias_, p.g * D + at.c);
    T inputs[kOwn], outputs[kOwn], decay[V], h[V] = {};
    load(inputs, low[R]);
    load(outputs, low[kColumns - 1]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) unpack(x[i], us[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) decay[v] = kEnds ? T(0) : T(1);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T a = exp2_(delta[i][v] * A[v]);
        h[v] = a * h[v] + delta[i][v] * x[i][v] * inputs[i];
        decay[v] = kEnds ? decay[v] + delta[i][v] : decay[v] * a;
        x[i][v] = skip[v] * x[i][v] + outputs[i] * h[v];
        delta[i][v] = outputs[i] * decay[v];
      }
    }
    store(&decays[at.slice][at.lane * V], decay);
    store(&ends[at.slice][at.lane * V], h);
    __syncthreads();
    if (joins) {
      const i64 index = (p.b * G + p.g) * ((steps + Rows::kSteps - 1) / Rows::kSteps) + start / Rows::kSteps;
      if (!kEnds && states) states[index * D + channel] = state;
#pragma unroll
      for (int i = 0; i < Rows::kSlices; ++i) {
        const T end = ends[i][threadIdx.x], gain = decays[i][threadIdx.x];
        if (kEnds) total += gain;
        ends[i][threadIdx.x] = state;
        state = (kEnds ? exp2_(gain * rate) : gain) * state + end;
      }
    }
    if (kEnds) continue;
    __syncthreads();
    T before[V];
    load(before, &ends[at.slice][at.lane * V]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!at.active || at.own + i >= count) continue;
      const int token = span.tokens[parity][at.own + i];
#pragma unroll
      for (int v = 0; v < V; ++v) x[i][v] += delta[i][v] * before[v];
      y.put(token, x[i], merged);
    }
  }
  if (!kEnds || !joins) return;
  boundary[p.index * D + channel] = state;
  sums[p.index * D + channel] = total;
}

// As `backward` (kEnds: as `adjoint_ends`), for N = 1.
template <class S, class T, int R, int V, int kLanes, bool kSoftplus, bool kEnds>
__global__ void __launch_bounds__(kThreads, 4)
    backward_one(const S* __restrict__ dy_, i64 dy_batch, i64 dy_token, i64 dy_group, const S* __restrict__ u_,
                 i64 u_batch, i64 u_token, i64 u_group, const S* __restrict__ dt_, i64 dt_batch, i64 dt_token,
                 i64 dt_group, const S* __restrict__ B_, i64 B_batch, i64 B_token, i64 B_group,
                 const S* __restrict__ C_, i64 C_batch, i64 C_token, i64 C_group, const T* __restrict__ A_,
                 const T* __restrict__ skip_, const T* __restrict__ weight_, const T* __restrict__ bias_,
                 const int* __restrict__ order_, i64 order_batch, i64 batch, i64 L, i64 G, i64 D, i64 steps, i64 blocks,
                 i64 segments, i64 segment_steps, T* __restrict__ boundary, T* __restrict__ sums,
                 const T* __restrict__ states, S* __restrict__ du_, T* __restrict__ merged, S* __restrict__ ddt_,
                 T* __restrict__ dA_, T* __restrict__ dB_, T* __restrict__ dC_, T* __restrict__ dskip_,
                 T* __restrict__ dlow_, T* __restrict__ dweight_, T* __restrict__ dbias_) {
  constexpr int kColumns = R + 2, kWidth = kLanes * V;
  constexpr bool kShared = R <= 24, kKept = R <= 48;  // what shared memory holds of weights and their gradients
  using Rows = Span<T, kLanes, kColumns>;
  __shared__ Rows span;
  __shared__ Weights<T, R, V, kLanes, kShared> weights;
  alignas(16) __shared__ T decays[Rows::kSlices][kWidth], ends[Rows::kSlices][kWidth], begins[Rows::kSlices][kWidth];
  // Sums over channels of each step, as the columns lie; ddelta of a span; sums over steps.
  alignas(16) __shared__ T found[kEnds ? 1 : kColumns][Rows::kPitch], ddeltas[kEnds ? 1 : Rows::kSteps][kWidth + V];
  alignas(16) __shared__ T dweight[kEnds || !kKept ? 1 : R + 1][kWidth];
  const Place p(G, D, steps, blocks, segments, segment_steps);
  if (kEnds && p.segment == 0) return;  // no segment ends where it begins
  const Order order{order_, order_batch, steps};
  const Corner<kLanes, V> at(D, blocks);
  const Tokens<const S> dy(dy_, p.b * dy_batch + p.g * dy_group + at.c, dy_token);
  const Tokens<const S> u(u_, p.b * u_batch + p.g * u_group + at.c, u_token);
  const Tokens<const S> dt(dt_, p.b * dt_batch + p.g * dt_group + (R ? 0 : at.c), dt_token);
  const Tokens<const S> B(B_, p.b * B_batch + p.g * B_group, B_token), C(C_, p.b * C_batch + p.g * C_group, C_token);
  const Tokens<S> ddt(ddt_, (p.b * L * G + p.g) * D + at.c, G * D);
  const Sink<S, T> du(du_ + (p.b * L * G + p.g) * D + at.c, G * D, merged + p.b * L * D + at.c, D, merged);
  const i64 row = (blockIdx.x % static_cast<unsigned>(blocks) * batch + p.b) * L * G + p.g;
  const Tokens<T> dlow(dlow_, row * R, G * R), dB(dB_, row, G), dC(dC_, row, G);
  T dA[V] = {}, dskip[V] = {};
  const T* weight = weight_ + p.g * R * D;
  weights.stage(weight, at, D);
  const auto weight_row = [&](T(&out)[V], int r) { weights.row(out, r, weight, at.lane * V, at.first, D); };
  // A thread's sums over steps of rank r of the weights' gradient; the bias has rank R, so to say.
  const i64 bsg = (p.b * segments + p.segment) * G + p.g;
  const auto weight_sums = [&](int r) {
    return kKept ? &dweight[r][at.lane * V] : (r < R ? dweight_ + (bsg * R + r) * D : dbias_ + bsg * D) + at.c;
  };
  const bool sums_up = !kEnds && (kKept || at.active);
  for (int r = at.slice; r <= R && sums_up; r += Rows::kSlices) {
    const T zeros[V] = {};
    store(weight_sums(r), zeros);
  }
  // The channel that a thread joins; its adjoint state behind a span, and the sum of its step sizes.
  const i64 channel = at.first + threadIdx.x;
  const bool joins = threadIdx.x < kWidth && channel < D;
  const T rate = joins ? A_[p.g * D + channel] : T(0);
  T adjoint = !kEnds && boundary && joins ? boundary[p.index * D + channel] : T(0), total = 0;
  int parity = 0;
  const i64 last = p.begin + (p.end - p.begin - 1) / Rows::kSteps * Rows::kSteps;
  span.keep(0, span.token(order, p, last));
  __syncthreads();
  for (i64 start = last; start >= p.begin; start -= Rows::kSteps, parity ^= 1) {
    const int count = static_cast<int>(smaller<i64>(Rows::kSteps, p.end - start));
    const int next = span.token(order, p, start - Rows::kSteps);
    T x[kOwn][V], dys[kOwn][V], delta[kOwn][V];
    Pack<S, V> us[kOwn], dts[kOwn], dy_own[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int token = span.tokens[parity][at.own + i];
      dy_own[i] = read<V>(dy.at(token));
      if (!kEnds) us[i] = read<V>(u.at(token));
      if (!R) dts[i] = read<V>(dt.at(token));
    }
    span.template stage<R>(dt, B, C, parity, count);
    const i64 index = (p.b * G + p.g) * ((steps + Rows::kSteps - 1) / Rows::kSteps) + start / Rows::kSteps;
    T state = !kEnds && joins ? states[index * D + channel] : T(0);
    __syncthreads();
    span.keep(parity ^ 1, next);
#pragma unroll
    for (int i = 0; i < kOwn && !R; ++i) unpack(delta[i], dts[i]);
    const auto low = reinterpret_cast<const T(*)[Rows::kPitch]>(&span.columns[0][at.own]);
    step_sizes<kSoftplus, R, R && kShared ? R : 2>(delta, low, weight_row, bias_, p.g * D + at.c);
    T inputs[kOwn], outputs[kOwn], decay[V], h[V] = {}, carried[V] = {}, A[V];
    load_channels(A, A_, p.g * D + at.c);
    load(inputs, low[R]);
    load(outputs, low[R + 1]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      unpack(dys[i], dy_own[i]);
      if (!kEnds) unpack(x[i], us[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) dys[i][v] = at.active && at.own + i < count ? dys[i][v] : T(0);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      T a[kOwn];
      decay[v] = kEnds ? T(0) : T(1);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        a[i] = exp2_(delta[i][v] * A[v]);
        if (!kEnds) h[v] = a[i] * h[v] + delta[i][v] * x[i][v] * inputs[i];
        decay[v] = kEnds ? decay[v] + delta[i][v] : decay[v] * a[i];
      }
#pragma unroll
      for (int i = kOwn - 1; i >= 0; --i) carried[v] = a[i] * (carried[v] + outputs[i] * dys[i][v]);
    }
    store(&decays[at.slice][at.lane * V], decay);
    store(&begins[at.slice][at.lane * V], carried);
    if (!kEnds) store(&ends[at.slice][at.lane * V], h);
    __syncthreads();
    if (joins) {
#pragma unroll
      for (int i = 0; i < Rows::kSlices; ++i) {
        const int j = Rows::kSlices - 1 - i;
        const T begin = begins[j][threadIdx.x], behind = decays[j][threadIdx.x];
        if (kEnds) total += behind;
        begins[j][threadIdx.x] = adjoint;
        adjoint = (kEnds ? exp2_(behind * rate) : behind) * adjoint + begin;
        if (kEnds) continue;
        const T end = ends[i][threadIdx.x], gain = decays[i][threadIdx.x];
        ends[i][threadIdx.x] = state;
        state = gain * state + end;
      }
    }
    if (kEnds) continue;
    __syncthreads();
    T skip[V];
    load_channels(skip, skip_, p.g * D + at.c);
    load_channels(A, A_, p.g * D + at.c);  // anew, like the decays below: registers are dearer
    load(carried, &begins[at.slice][at.lane * V]);
    load(h, &ends[at.slice][at.lane * V]);
    load(inputs, low[R]);
    load(outputs, low[R + 1]);
    T dBs[kOwn] = {}, dCs[kOwn] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {  // a channel after the other, for want of registers
      T kept[kOwn];                // what a step keeps of the state before
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        kept[i] = exp2_(delta[i][v] * A[v]) * h[v];
        h[v] = kept[i] + delta[i][v] * x[i][v] * inputs[i];
        dCs[i] += dys[i][v] * h[v];
      }
#pragma unroll
      for (int i = kOwn - 1; i >= 0; --i) {
        const T own = delta[i][v], value = x[i][v], g = carried[v] + outputs[i] * dys[i][v];
        const T dinput = g * inputs[i], through_decay = g * kept[i];
        carried[v] = g * exp2_(own * A[v]);
        dBs[i] += g * (own * value);
        dA[v] += through_decay * own;
        dskip[v] += dys[i][v] * value;
        x[i][v] = dinput * own + skip[v] * dys[i][v];
        // A counts in units of log2(e); d softplus(x) / dx = 1 - exp(-softplus(x))
        const T slope = kSoftplus ? one_less_exp(own) : T(1);
        delta[i][v] = (through_decay * A[v] * T(0.6931471805599453) + dinput * value) * slope;
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      store(&ddeltas[at.own + i][at.lane * V], delta[i]);
      if (!at.active || at.own + i >= count) continue;
      const int token = span.tokens[parity][at.own + i];
      du.put(token, x[i], merged);
      if (!R) write(ddt.at(token), delta[i]);
    }
    span_sums<kLanes>(found[R], dBs, at);
    span_sums<kLanes>(found[R + 1], dCs, at);
    __syncthreads();
    if constexpr (R > 0) {  // a thread has a step, and every kGroups-th rank of its low-rank row
      constexpr int kGroups = kThreads / Rows::kSteps, kEach = (R + kGroups - 1) / kGroups;
      const int step = threadIdx.x % Rows::kSteps, group = threadIdx.x / Rows::kSteps;
      T sums[kEach] = {};
#pragma unroll 2
      for (int c = 0; c < kWidth; c += V) {
        T values[V], w[V];
        load(values, &ddeltas[step][c]);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          weights.row(w, smaller(group + i * kGroups, R - 1), weight, c, at.first, D);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[i] += values[v] * w[v];
        }
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (group + i * kGroups < R) found[group + i * kGroups][step] = sums[i];
      }
    }
    for (int r = at.slice; r <= R && sums_up; r += Rows::kSlices) {
      T parts[V];
      load(parts, weight_sums(r));
#pragma unroll 4
      for (int i = 0; i < Rows::kSteps; ++i) {
        T values[V];
        load(values, &ddeltas[i][at.lane * V]);
        const T low = r < R ? span.columns[r][i] : T(1);
#pragma unroll
        for (int v = 0; v < V; ++v) parts[v] += values[v] * low;
      }
      store(weight_sums(r), parts);
    }
    __syncthreads();
    span.template put_back<R>(found, dlow, dB, dC, parity, count);
  }
  if (kEnds && joins) {
    boundary[p.index * D + channel] = adjoint;
    sums[p.index * D + channel] = total;
  }
  if (kEnds) return;
  // The sums over steps of the slices.
  store(&decays[at.slice][at.lane * V], dA);
  store(&ends[at.slice][at.lane * V], dskip);
  __syncthreads();
  if (!joins) return;
  T all[2] = {};
  for (int i = 0; i < Rows::kSlices; ++i) {
    all[0] += decays[i][threadIdx.x];
    all[1] += ends[i][threadIdx.x];
  }
  dA_[bsg * D + channel] = all[0];
  dskip_[bsg * D + channel] = all[1];
  if (!kKept) return;
  dbias_[bsg * D + channel] = dweight[R][threadIdx.x];
  for (int r = 0; r < R; ++r) dweight_[(bsg * R + r) * D + channel] = dweight[r][threadIdx.x];
}
