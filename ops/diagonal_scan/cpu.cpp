// Complex diagonal recurrence on the CPU, forward and backward. A step of a batch item is M complex numbers, (re, im)
// interleaved; lanes are consecutive states, a task is kBlocks vectors of them, so that a step reads whole lines in a
// row. The sums of a constant gain's gradient are kept for each batch item and added afterwards: a fixed order.
//
//   h_t = a_t h_{t-1} + b_t

#include "../kernel.h"

namespace linzoo {
namespace {

constexpr int kBlocks = 8;

// A vector of complex numbers, parts apart.
template <class T>
struct Lanes {
  using V = typename Simd<T>::vec;
  V re, im;
};

// Two vectors of interleaved parts as parts apart, and back.
inline Lanes<float> apart(vfloat a, vfloat b) {
  return {LINZOO_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          LINZOO_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}
inline Lanes<double> apart(vdouble a, vdouble b) {
  return {vdouble{a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]},
          vdouble{a[1], a[3], a[5], a[7], b[1], b[3], b[5], b[7]}};
}
inline void interleave(const Lanes<float>& v, vfloat& a, vfloat& b) {
  a = LINZOO_SHUFFLE(v.re, v.im, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  b = LINZOO_SHUFFLE(v.re, v.im, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline void interleave(const Lanes<double>& v, vdouble& a, vdouble& b) {
  a = vdouble{v.re[0], v.im[0], v.re[1], v.im[1], v.re[2], v.im[2], v.re[3], v.im[3]};
  b = vdouble{v.re[4], v.im[4], v.re[5], v.im[5], v.re[6], v.im[6], v.re[7], v.im[7]};
}

// n <= width complex numbers of interleaved parts.
template <class T, class S>
Lanes<T> load_pairs(const S* p, int n) {
  constexpr int W = Simd<T>::width;
  if (n == W) return apart(load<T>(p, W), load<T>(p + W, W));
  return apart(load<T>(p, std::min(2 * n, W)), load<T>(p + W, std::max(2 * n - W, 0)));
}

template <class T, class S>
void store_pairs(S* p, const Lanes<T>& v, int n) {
  constexpr int W = Simd<T>::width;
  typename Simd<T>::vec a, b;
  interleave(v, a, b);
  if (n == W) {
    store<T>(p, a, W);
    store<T>(p + W, b, W);
  } else {
    store<T>(p, a, std::min(2 * n, W));
    store<T>(p + W, b, std::max(2 * n - W, 0));
  }
}

// x y + z, and x^* y + z.
template <class T>
Lanes<T> multiply_add(const Lanes<T>& x, const Lanes<T>& y, const Lanes<T>& z) {
  return {x.re * y.re - x.im * y.im + z.re, x.re * y.im + x.im * y.re + z.im};
}
template <class T>
Lanes<T> conj_multiply_add(const Lanes<T>& x, const Lanes<T>& y, const Lanes<T>& z) {
  return {x.re * y.re + x.im * y.im + z.re, x.re * y.im - x.im * y.re + z.im};
}

struct Shape {
  int64_t B, L, M;
  bool constant, reverse;
  int64_t step(int64_t i) const { return reverse ? L - 1 - i : i; }  // the i-th that the recurrence reaches
};

// Calls f(batch item, first state, states) for every task.
template <class T, class F>
void for_tasks(const Shape& s, F f) {
  constexpr int64_t width = kBlocks * Simd<T>::width;
  const int64_t blocks = (s.M + width - 1) / width;
  torch::stable::parallel_for(0, s.B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * width;
      f(task / blocks, first, std::min(width, s.M - first));
    }
  });
}

// Calls f(vector, offset in numbers, lanes) for the vectors of `count` states.
template <class T, class F>
void for_vectors(int64_t count, F f) {
  constexpr int W = Simd<T>::width;
  int k = 0;
  for (; (k + 1) * W <= count; ++k) f(k, 2 * k * W, W);
  if (k * W < count) f(k, 2 * k * W, static_cast<int>(count - k * W));
}

template <class S, class T>
void run_forward(const T* a, const S* b, const T* initial, S* h, const Shape& s) {
  for_tasks<T>(s, [&](int64_t item, int64_t first, int64_t count) {
    Lanes<T> states[kBlocks] = {}, gains[kBlocks] = {};
    for_vectors<T>(count, [&](int k, int64_t offset, int lanes) {
      if (initial) states[k] = load_pairs<T>(initial + 2 * (item * s.M + first) + offset, lanes);
      if (s.constant) gains[k] = load_pairs<T>(a + 2 * first + offset, lanes);
    });
    for (int64_t i = 0; i < s.L; ++i) {
      const int64_t at = 2 * ((item * s.L + s.step(i)) * s.M + first);
      for_vectors<T>(count, [&](int k, int64_t offset, int lanes) {
        if (!s.constant) gains[k] = load_pairs<T>(a + at + offset, lanes);
        states[k] = multiply_add<T>(gains[k], states[k], load_pairs<T>(b + at + offset, lanes));
        store_pairs<T>(h + at + offset, states[k], lanes);
      });
    }
  });
}

// da: (B, M, 2) of a constant gain, else as b.
template <class S, class T>
void run_backward(const S* dh, const T* a, const S* h, const T* initial, T* da, S* db, T* dinitial, const Shape& s) {
  for_tasks<T>(s, [&](int64_t item, int64_t first, int64_t count) {
    const Lanes<T> zero = {};
    Lanes<T> carries[kBlocks] = {}, gains[kBlocks] = {}, sums[kBlocks] = {};
    const int64_t edge = 2 * (item * s.M + first);
    for_vectors<T>(count, [&](int k, int64_t offset, int lanes) {
      if (s.constant) gains[k] = load_pairs<T>(a + 2 * first + offset, lanes);
    });
    for (int64_t i = s.L - 1; i >= 0; --i) {
      const int64_t at = 2 * ((item * s.L + s.step(i)) * s.M + first);
      const int64_t before = i > 0 ? 2 * ((item * s.L + s.step(i - 1)) * s.M + first) : 0;
      for_vectors<T>(count, [&](int k, int64_t offset, int lanes) {
        const Lanes<T> d = load_pairs<T>(dh + at + offset, lanes);
        const Lanes<T> g = {d.re + carries[k].re, d.im + carries[k].im};
        store_pairs<T>(db + at + offset, g, lanes);
        Lanes<T> previous = {};
        if (i > 0) {
          previous = load_pairs<T>(h + before + offset, lanes);
        } else if (initial) {
          previous = load_pairs<T>(initial + edge + offset, lanes);
        }
        if (s.constant) {
          sums[k] = conj_multiply_add<T>(previous, g, sums[k]);
        } else {
          gains[k] = load_pairs<T>(a + at + offset, lanes);
          store_pairs<T>(da + at + offset, conj_multiply_add<T>(previous, g, zero), lanes);
        }
        carries[k] = conj_multiply_add<T>(gains[k], g, zero);
      });
    }
    for_vectors<T>(count, [&](int k, int64_t offset, int lanes) {
      if (s.constant) store_pairs<T>(da + edge + offset, sums[k], lanes);
      if (dinitial) store_pairs<T>(dinitial + edge + offset, carries[k], lanes);
    });
  });
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

Shape shape_of(const Tensor& a, const Tensor& b, bool reverse) {
  return {b.size(0), b.size(1), b.size(2), a.dim() == 2, reverse};
}

void forward(Tensor a, Tensor b, std::optional<Tensor> initial, bool reverse, Tensor h) {
  const Shape shape = shape_of(a, b, reverse);
  dispatch(b, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_forward(data<const T>(a), data<const S>(b), data<const T>(initial), data<S>(h), shape);
  });
}

void backward(Tensor dh, Tensor a, Tensor h, std::optional<Tensor> initial, bool reverse, Tensor da, Tensor db,
              std::optional<Tensor> dinitial) {
  const Shape shape = shape_of(a, h, reverse);
  dispatch(h, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_backward(data<const S>(dh), data<const T>(a), data<const S>(h), data<const T>(initial), data<T>(da),
                 data<S>(db), data<T>(dinitial), shape);
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def("diagonal_scan_forward(Tensor a, Tensor b, Tensor? initial, bool reverse, Tensor(a!) h) -> ()");
  m.def(
      "diagonal_scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? initial, bool reverse, Tensor(a!) da, "
      "Tensor(b!) db, Tensor(c!)? dinitial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("diagonal_scan_forward", TORCH_BOX(&linzoo::forward));
  m.impl("diagonal_scan_backward", TORCH_BOX(&linzoo::backward));
}
