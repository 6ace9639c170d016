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

// Rows of K values of the steps [start, start + count), as T, into shared memory; by the whole block.
template <int K, class T, class S>
__device__ __forceinline__ void stage(T (*out)[K], const Rows<S>& rows, const Order& order, const Place& p, i64 start,
                                      int count) {
  for (int i = threadIdx.x; i < count * K; i += blockDim.x) {
    out[i / K][i % K] = get<T>(rows.at(p.b, order.token(p.b, p.g, start + i / K), p.g) + i % K);
  }
}

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

// kEnds: writes only the state at the segment's end when it begins at 0, and the sum of its step sizes.
// y of one group is written, of several groups that are merged is added to.
template <class S, class T, int N, int R, bool kSoftplus, bool kEnds>
__global__ void __launch_bounds__(kThreads)
    forward(const S* u_, i64 u_batch, i64 u_token, i64 u_group, const S* dt_, i64 dt_batch, i64 dt_token, i64 dt_group,
            const S* B_, i64 B_batch, i64 B_token, i64 B_group, const S* C_, i64 C_batch, i64 C_token, i64 C_group,
            const T* A_, const T* skip_, const T* weight_, const T* bias_, const int* order_, i64 order_batch, i64 G,
            i64 D, i64 steps, i64 blocks, i64 segments, i64 segment_steps, T* boundary, T* sums, T* states, S* y_,
            i64 y_batch, i64 y_token, i64 y_group, T* merged) {
  constexpr int kLow = R ? R : 1;
  __shared__ T Bs[kChunk][N], Cs[kChunk][N], lows[kChunk][kLow];
  const Place p(G, D, steps, blocks, segments, segment_steps);
  const Order order{order_, order_batch, steps};
  const Rows<const S> u{u_, u_batch, u_token, u_group}, dt{dt_, dt_batch, dt_token, dt_group};
  const Rows<const S> B{B_, B_batch, B_token, B_group}, C{C_, C_batch, C_token, C_group};
  const Rows<S> y{y_, y_batch, y_token, y_group};
  const i64 chunks = (steps + kChunk - 1) / kChunk;

  T A[N], h[N], weight[kLow], skip[1], bias[1], sum = 0;
  load_column(A, A_, p, D, N);
  load_column(weight, weight_, p, D, R);
  load_column(skip, skip_, p, D, 1);
  load_column(bias, bias_, p, D, 1);
#pragma unroll
  for (int n = 0; n < N; ++n) h[n] = !kEnds && boundary && p.active ? boundary[(p.index * N + n) * D + p.c] : T(0);

  for (i64 start = p.begin; start < p.end; start += kChunk) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    __syncthreads();
    stage<N>(Bs, B, order, p, start, count);
    if (!kEnds) stage<N>(Cs, C, order, p, start, count);
    if (R) stage<kLow>(lows, dt, order, p, start, count);
    __syncthreads();
    if (!p.active) continue;
    if (!kEnds && states) {
#pragma unroll
      for (int n = 0; n < N; ++n) states[(((p.b * G + p.g) * chunks + start / kChunk) * N + n) * D + p.c] = h[n];
    }
    T us[kChunk], own[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      const i64 l = order.token(p.b, p.g, start + i);
      us[i] = get<T>(u.at(p.b, l, p.g) + p.c);
      own[i] = R ? T(0) : get<T>(dt.at(p.b, l, p.g) + p.c);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      const T delta = step_size<kSoftplus, R>(lows[i], weight, own[i], bias[0]), input = delta * us[i];
      T out = skip[0] * us[i];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        h[n] = exp2_(delta * A[n]) * h[n] + input * Bs[i][n];
        if (!kEnds) out += h[n] * Cs[i][n];
      }
      if (kEnds) {
        sum += delta;
        continue;
      }
      const i64 l = order.token(p.b, p.g, start + i);
      if (merged) {
        atomicAdd(merged + p.b * y_batch + l * y_token + p.c, out);
      } else {
        put(y.at(p.b, l, p.g) + p.c, out);
      }
    }
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
  __shared__ T Cs[kChunk][N], lows[kChunk][kLow];
  const Place p(G, D, steps, blocks, segments, segment_steps);
  const Order order{order_, order_batch, steps};
  const Rows<const S> dy{dy_, dy_batch, dy_token, dy_group}, dt{dt_, dt_batch, dt_token, dt_group};
  const Rows<const S> C{C_, C_batch, C_token, C_group};

  T A[N], carry[N] = {}, weight[kLow], bias[1], sum = 0;
  load_column(A, A_, p, D, N);
  load_column(weight, weight_, p, D, R);
  load_column(bias, bias_, p, D, 1);
  for (i64 start = p.begin + (p.end - p.begin - 1) / kChunk * kChunk; start >= p.begin; start -= kChunk) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    __syncthreads();
    stage<N>(Cs, C, order, p, start, count);
    if (R) stage<kLow>(lows, dt, order, p, start, count);
    __syncthreads();
    if (!p.active) continue;
    T dys[kChunk], own[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) continue;
      const i64 l = order.token(p.b, p.g, start + i);
      dys[i] = get<T>(dy.at(p.b, l, p.g) + p.c);
      own[i] = R ? T(0) : get<T>(dt.at(p.b, l, p.g) + p.c);
    }
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      if (i >= count) continue;
      const T delta = step_size<kSoftplus, R>(lows[i], weight, own[i], bias[0]);
      sum += delta;
#pragma unroll
      for (int n = 0; n < N; ++n) carry[n] = exp2_(delta * A[n]) * (carry[n] + dys[i] * Cs[i][n]);
    }
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
  for (i64 k = 0; k < segments; ++k) {
    const i64 segment = bg * segments + (kReverse ? segments - 1 - k : k);
    T* at = boundary + (segment * N + n) * D + d;
    const T end = *at;
    *at = h;
    h = exp2_(rate * sums[segment * D + d]) * h + end;
  }
}

// The sum over a block's channels of what its warps have each summed.
template <int kRows, class T>
__device__ __forceinline__ T over_warps(const T (*parts)[kRows][32], int row, int lane) {
  T sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += parts[warp][row][lane];
  return sum;
}

// Sums over channels go to (block of channels, B, L, G, -), sums over steps to (B, segments, G, -, D).
template <class S, class T, int N, int R, bool kSoftplus>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy_, i64 dy_batch, i64 dy_token, i64 dy_group, const S* u_, i64 u_batch, i64 u_token, i64 u_group,
             const S* dt_, i64 dt_batch, i64 dt_token, i64 dt_group, const S* B_, i64 B_batch, i64 B_token, i64 B_group,
             const S* C_, i64 C_batch, i64 C_token, i64 C_group, const T* A_, const T* skip_, const T* weight_,
             const T* bias_, const int* order_, i64 order_batch, i64 batch, i64 L, i64 G, i64 D, i64 steps, i64 blocks,
             i64 segments, i64 segment_steps, const T* boundary, const T* states, S* du, S* ddt, T* dA_, T* dB, T* dC,
             T* dskip_, T* dlow, T* dweight_, T* dbias_) {
  constexpr int kLow = R ? R : 1, kRows = N + (R + 1) / 2;
  __shared__ T Bs[kChunk][N], Cs[kChunk][N], lows[kChunk][kLow], parts[kThreads / 32][kRows][32];
  const Place p(G, D, steps, blocks, segments, segment_steps);
  const Order order{order_, order_batch, steps};
  const Rows<const S> dy{dy_, dy_batch, dy_token, dy_group}, u{u_, u_batch, u_token, u_group};
  const Rows<const S> dt{dt_, dt_batch, dt_token, dt_group};
  const Rows<const S> B{B_, B_batch, B_token, B_group}, C{C_, C_batch, C_token, C_group};
  const i64 chunks = (steps + kChunk - 1) / kChunk, block = blockIdx.x % blocks;

  T A[N], dA[N] = {}, carried[N], weight[kLow], dweight[kLow] = {}, skip[1], bias[1], dskip = 0, dbias = 0;
  load_column(A, A_, p, D, N);
  load_column(weight, weight_, p, D, R);
  load_column(skip, skip_, p, D, 1);
  load_column(bias, bias_, p, D, 1);
#pragma unroll
  for (int n = 0; n < N; ++n) carried[n] = boundary && p.active ? boundary[(p.index * N + n) * D + p.c] : T(0);

  for (i64 start = p.begin + (p.end - p.begin - 1) / kChunk * kChunk; start >= p.begin; start -= kChunk) {
    const int count = static_cast<int>(smaller<i64>(kChunk, p.end - start));
    __syncthreads();
    stage<N>(Bs, B, order, p, start, count);
    stage<N>(Cs, C, order, p, start, count);
    if (R) stage<kLow>(lows, dt, order, p, start, count);
    __syncthreads();
    // Steps behind the last, and channels that are none, have dy = u = delta = 0: they change nothing.
    T us[kChunk], dys[kChunk], delta[kChunk], dinput[kChunk] = {}, ddelta[kChunk] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      us[i] = dys[i] = delta[i] = 0;
      if (!p.active || i >= count) continue;
      const i64 l = order.token(p.b, p.g, start + i);
      us[i] = get<T>(u.at(p.b, l, p.g) + p.c);
      dys[i] = get<T>(dy.at(p.b, l, p.g) + p.c);
      const T own = R ? T(0) : get<T>(dt.at(p.b, l, p.g) + p.c);
      delta[i] = step_size<kSoftplus, R>(lows[i], weight, own, bias[0]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      T h[kChunk + 1], sums[32];  // sums: dB of each step, then dC
      h[0] = p.active ? states[(((p.b * G + p.g) * chunks + start / kChunk) * N + n) * D + p.c] : T(0);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        h[i + 1] = exp2_(delta[i] * A[n]) * h[i] + (i < count ? delta[i] * us[i] * Bs[i][n] : T(0));
      }
#pragma unroll
      for (int i = kChunk - 1; i >= 0; --i) {
        const T B_i = i < count ? Bs[i][n] : T(0), C_i = i < count ? Cs[i][n] : T(0);
        sums[kChunk + i] = dys[i] * h[i + 1];
        carried[n] += dys[i] * C_i;
        sums[i] = carried[n] * delta[i] * us[i];
        dinput[i] += carried[n] * B_i;
        carried[n] *= exp2_(delta[i] * A[n]);
        const T through_decay = carried[n] * h[i];
        ddelta[i] += through_decay * A[n];
        dA[n] += through_decay * delta[i];
      }
      const T sum = warp_sums(sums);
      parts[threadIdx.x / 32][n][threadIdx.x % 32] = sum;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      // A counts in units of log2(e); d softplus(x) / dx = 1 - exp(-softplus(x))
      const T slope = kSoftplus ? -expm1_(-delta[i]) : T(1);
      ddelta[i] = (ddelta[i] * T(0.6931471805599453) + dinput[i] * us[i]) * slope;
      if (!p.active || i >= count) {
        ddelta[i] = 0;
        continue;
      }
      dskip += dys[i] * us[i];
      dbias += ddelta[i];
      const i64 at = ((p.b * L + order.token(p.b, p.g, start + i)) * G + p.g) * D + p.c;
      put(du + at, dinput[i] * delta[i] + skip[0] * dys[i]);
      if (!R) put(ddt + at, ddelta[i]);
    }
#pragma unroll
    for (int r = 0; r < R; r += 2) {
      T sums[32];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        sums[i] = ddelta[i] * weight[r];
        sums[kChunk + i] = r + 1 < R ? ddelta[i] * weight[r + 1 < R ? r + 1 : r] : T(0);
        if (i >= count) continue;
        dweight[r] += ddelta[i] * lows[i][r];
        if (r + 1 < R) dweight[r + 1 < R ? r + 1 : r] += ddelta[i] * lows[i][r + 1 < R ? r + 1 : r];
      }
      const T sum = warp_sums(sums);
      parts[threadIdx.x / 32][N + r / 2][threadIdx.x % 32] = sum;
    }
    __syncthreads();
    const i64 tokens = (block * batch + p.b) * L;
    for (int i = threadIdx.x; i < count * (2 * N + R); i += blockDim.x) {
      const int step = i / (2 * N + R), k = i % (2 * N + R);
      const i64 row = (tokens + order.token(p.b, p.g, start + step)) * G + p.g;
      if (k < N) {
        dB[row * N + k] = over_warps(parts, k, step);
      } else if (k < 2 * N) {
        dC[row * N + k - N] = over_warps(parts, k - N, kChunk + step);
      } else {
        const int r = k - 2 * N;
        dlow[row * R + r] = over_warps(parts, N + r / 2, r % 2 * kChunk + step);
      }
    }
  }
  if (!p.active) return;
  const i64 bsg = (p.b * segments + p.segment) * G + p.g;
#pragma unroll
  for (int n = 0; n < N; ++n) dA_[(bsg * N + n) * D + p.c] = dA[n];
#pragma unroll
  for (int r = 0; r < R; ++r) dweight_[(bsg * R + r) * D + p.c] = dweight[r];
  dskip_[bsg * D + p.c] = dskip;
  dbias_[bsg * D + p.c] = dbias;
}
