// Complex diagonal recurrence on the CPU, forward and backward. A step of a batch item is M complex numbers, (re, im)
// interleaved; lanes are consecutive states, a task is a block of them. The sums of a constant gain's gradient are
// kept for each batch item and added afterwards: a fixed order.
//
//   h_t = a_t h_{t-1} + b_t

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../simd.h"

namespace linzoo {
namespace {

using torch::stable::Tensor;

// A vector of complex numbers, parts apart.
template <class T>
struct Lanes {
  using V = typename Simd<T>::vec;
  V re, im;
};

// n <= width complex numbers of interleaved parts.
template <class T, class S>
Lanes<T> load_pairs(const S* p, int n) {
  T re[Simd<T>::width] = {}, im[Simd<T>::width] = {};
  if (n == Simd<T>::width) {
    for (int i = 0; i < Simd<T>::width; ++i) re[i] = static_cast<T>(p[2 * i]), im[i] = static_cast<T>(p[2 * i + 1]);
  } else {
    for (int i = 0; i < n; ++i) re[i] = static_cast<T>(p[2 * i]), im[i] = static_cast<T>(p[2 * i + 1]);
  }
  Lanes<T> v;
  std::memcpy(&v.re, re, sizeof v.re);
  std::memcpy(&v.im, im, sizeof v.im);
  return v;
}

template <class T, class S>
void store_pairs(S* p, const Lanes<T>& v, int n) {
  T re[Simd<T>::width], im[Simd<T>::width];
  std::memcpy(re, &v.re, sizeof v.re);
  std::memcpy(im, &v.im, sizeof v.im);
  if (n == Simd<T>::width) {
    for (int i = 0; i < Simd<T>::width; ++i) p[2 * i] = static_cast<S>(re[i]), p[2 * i + 1] = static_cast<S>(im[i]);
  } else {
    for (int i = 0; i < n; ++i) p[2 * i] = static_cast<S>(re[i]), p[2 * i + 1] = static_cast<S>(im[i]);
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

// Calls f(batch item, first state, lanes) for every task.
template <class T, class F>
void for_tasks(const Shape& s, F f) {
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (s.M + W - 1) / W;
  torch::stable::parallel_for(0, s.B * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * W;
      f(task / blocks, first, static_cast<int>(std::min<int64_t>(W, s.M - first)));
    }
  });
}

template <class S, class T>
void run_forward(const T* a, const S* b, const T* initial, S* h, const Shape& s) {
  for_tasks<T>(s, [&](int64_t item, int64_t first, int lanes) {
    Lanes<T> state = {}, gain = {};
    if (initial) state = load_pairs<T>(initial + 2 * (item * s.M + first), lanes);
    if (s.constant) gain = load_pairs<T>(a + 2 * first, lanes);
    for (int64_t i = 0; i < s.L; ++i) {
      const int64_t at = 2 * ((item * s.L + s.step(i)) * s.M + first);
      if (!s.constant) gain = load_pairs<T>(a + at, lanes);
      state = multiply_add<T>(gain, state, load_pairs<T>(b + at, lanes));
      store_pairs<T>(h + at, state, lanes);
    }
  });
}

// da: (B, M, 2) of a constant gain, else as b.
template <class S, class T>
void run_backward(const S* dh, const T* a, const S* h, const T* initial, T* da, S* db, T* dinitial, const Shape& s) {
  for_tasks<T>(s, [&](int64_t item, int64_t first, int lanes) {
    const Lanes<T> zero = {};
    Lanes<T> carry = {}, gain = {}, sum = {};
    const int64_t edge = 2 * (item * s.M + first);
    if (s.constant) gain = load_pairs<T>(a + 2 * first, lanes);
    for (int64_t i = s.L - 1; i >= 0; --i) {
      const int64_t at = 2 * ((item * s.L + s.step(i)) * s.M + first);
      const Lanes<T> d = load_pairs<T>(dh + at, lanes);
      const Lanes<T> g = {d.re + carry.re, d.im + carry.im};
      store_pairs<T>(db + at, g, lanes);
      Lanes<T> previous = {};
      if (i > 0) {
        previous = load_pairs<T>(h + 2 * ((item * s.L + s.step(i - 1)) * s.M + first), lanes);
      } else if (initial) {
        previous = load_pairs<T>(initial + edge, lanes);
      }
      if (s.constant) {
        sum = conj_multiply_add<T>(previous, g, sum);
      } else {
        gain = load_pairs<T>(a + at, lanes);
        store_pairs<T>(da + at, conj_multiply_add<T>(previous, g, zero), lanes);
      }
      carry = conj_multiply_add<T>(gain, g, zero);
    }
    if (s.constant) store_pairs<T>(da + edge, sum, lanes);
    if (dinitial) store_pairs<T>(dinitial + edge, carry, lanes);
  });
}

template <class F>
void dispatch(const Tensor& x, F f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{}, float{});
    case ScalarType::Half: return f(c10::Half{}, float{});
    default: STD_TORCH_CHECK(false, "b: expected float64, float32, bfloat16 or float16");
  }
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
