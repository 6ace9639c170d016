// Group-wise rational function on the CPU, forward and backward. Lanes are channels; a task is kVectors vectors of
// channels and a split of the rows. It goes over tiles of kRows rows, vector by vector: a row's next vector is the next
// cache line. Within a tile the coefficients, one set per channel, stay in registers, and so do the sums of their
// gradients, which are then added to the task's: no atomics, a fixed order.
//
//   P = a_0 + a_1 x + ... + a_5 x^5;  Q = 1 + |b_1||x| + ... + |b_4||x|^4;  y = P / Q

#include "../kernel.h"

namespace linzoo {
namespace {

constexpr int kNum = 6, kDen = 4, kRows = 16, kVectors = 8;

template <class T>
struct Coefficients {
  using V = typename Simd<T>::vec;
  V a[kNum], b[kDen];
  Coefficients(const T* table, int64_t D, int64_t first, int lanes) {  // table (kNum + kDen, D), |b| in its last rows
    for (int i = 0; i < kNum; ++i) a[i] = load<T>(table + i * D + first, lanes);
    for (int j = 0; j < kDen; ++j) b[j] = load<T>(table + (kNum + j) * D + first, lanes);
  }
  V numerator(V x) const {
    V p = a[kNum - 1];
    for (int i = kNum - 2; i >= 0; --i) p = p * x + a[i];
    return p;
  }
  V denominator(V absolute) const {
    V q = b[kDen - 1];
    for (int j = kDen - 2; j >= 0; --j) q = q * absolute + b[j];
    return q * absolute + T(1);
  }
};

template <class V>
inline V absolute(V x) {
  const V zero = {};
  return x < zero ? -x : x;
}

// Calls f(first channel, channels, first row, last row, split) for every task.
template <class T, class F>
void for_tasks(int64_t rows, int64_t D, int64_t split_rows, F f) {
  constexpr int64_t width = kVectors * Simd<T>::width;
  const int64_t blocks = (D + width - 1) / width, splits = (rows + split_rows - 1) / split_rows;
  torch::stable::parallel_for(0, blocks * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * width, split = task / blocks;
      f(first, std::min(width, D - first), split * split_rows, std::min(rows, (split + 1) * split_rows), split);
    }
  });
}

// Calls f(vector, first channel, lanes, first row, last row) for every vector of every tile of a task.
template <class T, class F>
void for_tiles(int64_t first, int64_t channels, int64_t begin, int64_t end, F f) {
  constexpr int W = Simd<T>::width;
  for (int64_t start = begin; start < end; start += kRows) {
    for (int64_t k = 0; k * W < channels; ++k) {
      const int lanes = static_cast<int>(std::min<int64_t>(W, channels - k * W));
      f(k, first + k * W, lanes, start, std::min(end, start + kRows));
    }
  }
}

// A task is a few rows, side by side: their vectors at a channel share its coefficients, and are all loaded before the
// first is stored. Rows often lie a multiple of 4096 bytes apart, and then a load waits for the store before it.
template <class S, class T>
void run_forward(const S* x, const T* table, S* y, int64_t rows, int64_t D) {
  using V = typename Simd<T>::vec;
  constexpr int64_t kTile = 4;
  torch::stable::parallel_for(0, (rows + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile * D, count = std::min(kTile, rows - tile * kTile);
      by_channels<T>(0, D, [&](int64_t d, auto lanes) {
        const Coefficients<T> c(table, D, d, lanes);
        V v[kTile] = {};
        for (int64_t r = 0; r < count; ++r) v[r] = load<T>(x + first + r * D + d, lanes);
        for (V& value : v) value = c.numerator(value) / c.denominator(absolute(value));
        for (int64_t r = 0; r < count; ++r) store<T>(y + first + r * D + d, v[r], lanes);
      });
    }
  });
}

// sums: (splits, kNum + kDen, D), of the gradients of a and |b|.
template <class S, class T>
void run_backward(const S* dy, const S* x, const T* table, S* dx, T* sums, int64_t rows, int64_t D,
                  int64_t split_rows) {
  using V = typename Simd<T>::vec;
  for_tasks<T>(rows, D, split_rows, [&](int64_t first, int64_t channels, int64_t begin, int64_t end, int64_t split) {
    V totals[kVectors][kNum + kDen] = {};
    for_tiles<T>(first, channels, begin, end, [&](int64_t k, int64_t channel, int lanes, int64_t from, int64_t to) {
      const Coefficients<T> c(table, D, channel, lanes);
      V da[kNum] = {}, db[kDen] = {};
      V loaded[kRows][2];
      for (int64_t r = from; r < to; ++r) {
        loaded[r - from][0] = load<T>(x + r * D + channel, lanes);
        loaded[r - from][1] = load<T>(dy + r * D + channel, lanes);
      }
      for (int64_t r = from; r < to; ++r) {
        const V v = loaded[r - from][0], g = loaded[r - from][1];
        const V u = absolute(v), inverse = T(1) / c.denominator(u), value = c.numerator(v) * inverse;
        V slope_p = T(kNum - 1) * c.a[kNum - 1], slope_q = T(kDen) * c.b[kDen - 1];
        for (int i = kNum - 2; i >= 1; --i) slope_p = slope_p * v + T(i) * c.a[i];
        for (int j = kDen - 2; j >= 0; --j) slope_q = slope_q * u + T(j + 1) * c.b[j];
        const V zero = {};
        const V scaled = g * inverse;
        store<T>(dx + r * D + channel, scaled * (slope_p - value * (v < zero ? -slope_q : slope_q)), lanes);
        V power = scaled;
        for (int i = 0; i < kNum; ++i) {
          da[i] += power;
          power *= v;
        }
        power = -scaled * value;
        for (int j = 0; j < kDen; ++j) {
          power *= u;
          db[j] += power;
        }
      }
      for (int i = 0; i < kNum; ++i) totals[k][i] += da[i];
      for (int j = 0; j < kDen; ++j) totals[k][kNum + j] += db[j];
    });
    for_tiles<T>(first, channels, 0, 1, [&](int64_t k, int64_t channel, int lanes, int64_t, int64_t) {
      for (int i = 0; i < kNum + kDen; ++i) {
        store<T>(sums + (split * (kNum + kDen) + i) * D + channel, totals[k][i], lanes);
      }
    });
  });
}

void forward(Tensor x, Tensor table, Tensor y) {
  const int64_t D = x.size(1), rows = x.size(0);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_forward(static_cast<const S*>(x.data_ptr()), static_cast<const T*>(table.data_ptr()),
                static_cast<S*>(y.data_ptr()), rows, D);
  });
}

void backward(Tensor dy, Tensor x, Tensor table, int64_t split_rows, Tensor dx, Tensor sums) {
  const int64_t D = x.size(1), rows = x.size(0);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_backward(static_cast<const S*>(dy.data_ptr()), static_cast<const S*>(x.data_ptr()),
                 static_cast<const T*>(table.data_ptr()), static_cast<S*>(dx.data_ptr()),
                 static_cast<T*>(sums.data_ptr()), rows, D, split_rows);
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def("rational_forward(Tensor x, Tensor table, Tensor(a!) y) -> ()");
  m.def("rational_backward(Tensor dy, Tensor x, Tensor table, int split_rows, Tensor(a!) dx, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("rational_forward", TORCH_BOX(&linzoo::forward));
  m.impl("rational_backward", TORCH_BOX(&linzoo::backward));
}
