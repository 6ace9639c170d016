// What the CPU kernels share whose state is a matrix: its rows are key channels, its columns value channels.
#pragma once

#include "kernel.h"

namespace linzoo {

constexpr int kChunk = LINZOO_CHUNK;  // steps between two stored states
constexpr int kFewHeads = 16;         // with fewer, the columns of one are split

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
struct Activation {  // (batch, token, head, channel), or without heads
  T* rows = nullptr;
  int64_t batch = 0, token = 0, head = 0;
  Activation() = default;
  explicit Activation(const Tensor& x)
      : rows(data<T>(x)), batch(x.stride(0)), token(x.stride(1)), head(x.dim() == 4 ? x.stride(2) : 0) {}
  T* at(int64_t b, int64_t l, int64_t h = 0) const { return rows + b * batch + l * token + h * head; }
};

// K vectors of a row's columns: `count` columns, or fewer than fit.
template <class T, int K>
struct Wide {
  using V = typename Simd<T>::vec;
  V v[K];
  Wide() : v{} {}
  Wide(const T* row, int64_t count) {
    for (int j = 0; j < K; ++j) v[j] = load<T>(row + j * Simd<T>::width, lanes(count, j));
  }
  void put(T* row, int64_t count) const {
    for (int j = 0; j < K; ++j) store<T>(row + j * Simd<T>::width, v[j], lanes(count, j));
  }
  static int lanes(int64_t count, int j) {
    return static_cast<int>(std::max<int64_t>(std::min<int64_t>(count - j * Simd<T>::width, Simd<T>::width), 0));
  }
  Wide& operator+=(const Wide& other) {
    for (int j = 0; j < K; ++j) v[j] += other.v[j];
    return *this;
  }
  Wide operator*(T x) const {
    Wide out;
    for (int j = 0; j < K; ++j) out.v[j] = v[j] * x;
    return out;
  }
  Wide& add(const Wide& other, T x) {  // += other * x
    for (int j = 0; j < K; ++j) v[j] += other.v[j] * x;
    return *this;
  }
  V dot(const Wide& other) const {  // lane by lane
    V sum = v[0] * other.v[0];
    for (int j = 1; j < K; ++j) sum += v[j] * other.v[j];
    return sum;
  }
};

// Sums over the rows, several at once so that additions need not wait for each other.
template <class T, int K>
struct RowSum {
  static constexpr int kWays = 4 / K;
  Wide<T, K> ways[kWays];
  void add(int64_t n, const Wide<T, K>& row, T x) { ways[n % kWays].add(row, x); }
  Wide<T, K> total() {
    for (int i = 1; i < kWays; ++i) ways[0] += ways[i];
    return ways[0];
  }
};

// Calls f(n) for 0 .. N - 1, four at a time as far as they go: n % 4 is then known when it is compiled.
template <class F>
inline void for_rows(int64_t N, F f) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) f(n, 0), f(n + 1, 1), f(n + 2, 2), f(n + 3, 3);
  for (; n < N; ++n) f(n, 0);
}

}  // namespace linzoo
