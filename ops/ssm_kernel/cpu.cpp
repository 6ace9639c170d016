// The two sums behind convolution kernels of state spaces, forward and backward, complex numbers as (re, im) pairs.
//
//   vandermonde  K_l = 2 Re sum_n c_n exp(l x_n)
//   cauchy       R_k = sum_n v_n / (2i s_k - c_k w_n) + v_n^* / (2i s_k - c_k w_n^*)
//
// Lanes are the steps l, or the nodes k. Powers exp(l x) are the product of one for the lane and one for the block of
// lanes; the latter runs on in double, so that a phase is as good at the last step as at the first.

#include <complex>

#include "../kernel.h"

namespace linzoo {
namespace {

using Complex = std::complex<double>;

constexpr int64_t kChunk = 1024;  // steps of one task of vandermonde
constexpr double kGone = 1e-35;   // what has decayed to this is 0: float32's subnormal numbers are slow

template <class T>
Complex at(const T* p, int64_t i) {
  return {static_cast<double>(p[2 * i]), static_cast<double>(p[2 * i + 1])};
}

// exp(j x) for the lanes j.
template <class T>
void lane_powers(Complex x, typename Simd<T>::vec& re, typename Simd<T>::vec& im) {
  for (int j = 0; j < Simd<T>::width; ++j) {
    const Complex power = std::exp(static_cast<double>(j) * x);
    re[j] = static_cast<T>(power.real());
    im[j] = static_cast<T>(power.imag());
  }
}

template <class T>
void run_vandermonde(const T* c, const T* x, T* k, int64_t H, int64_t N, int64_t L) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int64_t chunks = (L + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, H * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> sums(kChunk / W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task / chunks, first = task % chunks * kChunk, count = std::min(kChunk, L - first);
      const int64_t blocks = (count + W - 1) / W;
      std::fill_n(sums.begin(), blocks, V{});
      for (int64_t n = h * N; n < (h + 1) * N; ++n) {
        const Complex rate = at(x, n), jump = std::exp(static_cast<double>(W) * rate);
        Complex power = 2.0 * at(c, n) * std::exp(static_cast<double>(first) * rate);
        V re, im;
        lane_powers<T>(rate, re, im);
        for (int64_t b = 0; b < blocks; ++b) {
          sums[b] += re * static_cast<T>(power.real()) - im * static_cast<T>(power.imag());
          power *= jump;
          if (rate.real() < 0 && std::abs(power.real()) + std::abs(power.imag()) < kGone) break;
        }
      }
      for (int64_t b = 0; b < blocks; ++b) {
        store<T>(k + h * L + first + b * W, sums[b], static_cast<int>(std::min<int64_t>(W, count - b * W)));
      }
    }
  });
}

// dc = 2 conj(sum_l dk_l e^(l x)), dx = 2 conj(c sum_l l dk_l e^(l x)): the lanes' own powers are applied at the end.
template <class T>
void run_vandermonde_backward(const T* dk, const T* c, const T* x, T* dc, T* dx, int64_t H, int64_t N, int64_t L) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (L + W - 1) / W;
  torch::stable::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> row(blocks);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t b = 0; b < blocks; ++b) {
        row[b] = load<T>(dk + h * L + b * W, static_cast<int>(std::min<int64_t>(W, L - b * W)));
      }
      for (int64_t n = h * N; n < (h + 1) * N; ++n) {
        const Complex rate = at(x, n), jump = std::exp(static_cast<double>(W) * rate);
        Complex power = 1;
        V sum_re = {}, sum_im = {}, moment_re = {}, moment_im = {};
        for (int64_t b = 0; b < blocks; ++b) {
          const V re = row[b] * static_cast<T>(power.real()), im = row[b] * static_cast<T>(power.imag());
          sum_re += re;
          sum_im += im;
          moment_re += re * static_cast<T>(b * W);
          moment_im += im * static_cast<T>(b * W);
          power *= jump;
          if (rate.real() < 0 && std::abs(power.real()) + std::abs(power.imag()) < kGone) break;
        }
        Complex sum = 0, moment = 0;
        for (int j = 0; j < W; ++j) {
          const Complex lane = std::exp(static_cast<double>(j) * rate), s(sum_re[j], sum_im[j]);
          sum += lane * s;
          moment += lane * (Complex(moment_re[j], moment_im[j]) + static_cast<double>(j) * s);
        }
        const Complex slope = 2.0 * at(c, n) * moment;
        dc[2 * n] = static_cast<T>(2 * sum.real());
        dc[2 * n + 1] = static_cast<T>(-2 * sum.imag());
        dx[2 * n] = static_cast<T>(slope.real());
        dx[2 * n + 1] = static_cast<T>(-slope.imag());
      }
    }
  });
}

// One mode at a vector of nodes: 1 / q = 1 / ((2i s - c w)(2i s - c w^*)).
template <class T>
struct Pole {
  using V = typename Simd<T>::vec;
  T re, im;
  V inverse_re, inverse_im;
  Pole(T re, T im, V s, V c) : re(re), im(im) {
    const V near = c * im - (s + s), far = c * im + (s + s), damping = c * re;
    const V q_re = damping * damping + near * far, q_im = -(T(4) * s) * damping;
    const V inverse = T(1) / (q_re * q_re + q_im * q_im);
    inverse_re = q_re * inverse;
    inverse_im = -q_im * inverse;
  }
};

// Nodes are (K, 2): s and c interleaved; of lanes beyond the last node, s is 0 and c is 1.
template <class T>
void load_nodes(const T* nodes, int64_t first, int64_t K, typename Simd<T>::vec& s, typename Simd<T>::vec& c) {
  s = broadcast<T>(0);
  c = broadcast<T>(1);
  for (int j = 0; j < Simd<T>::width && first + j < K; ++j) {
    s[j] = nodes[2 * (first + j)];
    c[j] = nodes[2 * (first + j) + 1];
  }
}

// v (H, V, N, 2), w (H, N, 2), nodes (K, 2), r (H, V, 2, K).
template <class T>
void run_cauchy(const T* v, const T* w, const T* nodes, T* r, int64_t H, int64_t vs, int64_t N, int64_t K) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (K + W - 1) / W;
  torch::stable::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> sums(2 * vs);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t b = 0; b < blocks; ++b) {
        V s, c;
        load_nodes<T>(nodes, b * W, K, s, c);
        std::fill(sums.begin(), sums.end(), V{});
        for (int64_t n = 0; n < N; ++n) {
          const T w_re = w[2 * (h * N + n)], w_im = w[2 * (h * N + n) + 1];
          const Pole<T> pole(w_re, w_im, s, c);
          for (int64_t i = 0; i < vs; ++i) {
            const T* value = v + 2 * ((h * vs + i) * N + n);
            const V re = c * (T(-2) * (value[0] * w_re + value[1] * w_im)), im = s * (T(4) * value[0]);
            sums[2 * i] += re * pole.inverse_re - im * pole.inverse_im;
            sums[2 * i + 1] += re * pole.inverse_im + im * pole.inverse_re;
          }
        }
        const int lanes = static_cast<int>(std::min<int64_t>(W, K - b * W));
        for (int64_t i = 0; i < 2 * vs; ++i) store<T>(r + (2 * h * vs + i) * K + b * W, sums[i], lanes);
      }
    }
  });
}

template <class T>
T sum_of(typename Simd<T>::vec v) {
  T sum = 0;
  for (int j = 0; j < Simd<T>::width; ++j) sum += v[j];
  return sum;
}

// With numerator m = -2c Re(v w^*) + 4i s Re(v), gradient g = conj(dr) / q and h = -g m / q, the loss changes by
// Re(g dm + h dq). dr (H, V, 2, K).
template <class T>
void run_cauchy_backward(const T* dr, const T* v, const T* w, const T* nodes, T* dv, T* dw, int64_t H, int64_t vs,
                         int64_t N, int64_t K) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (K + W - 1) / W;
  torch::stable::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> grads(2 * vs * blocks), sums(2 * vs), at_nodes(2 * blocks);
    for (int64_t b = 0; b < blocks; ++b) load_nodes<T>(nodes, b * W, K, at_nodes[2 * b], at_nodes[2 * b + 1]);
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t i = 0; i < 2 * vs; ++i) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int lanes = static_cast<int>(std::min<int64_t>(W, K - b * W));
          grads[b * 2 * vs + i] = load<T>(dr + (2 * h * vs + i) * K + b * W, lanes);
        }
      }
      for (int64_t n = 0; n < N; ++n) {
        const T w_re = w[2 * (h * N + n)], w_im = w[2 * (h * N + n) + 1];
        std::fill(sums.begin(), sums.end(), V{});
        V sum_re = {}, sum_im = {};
        for (int64_t b = 0; b < blocks; ++b) {
          const V s = at_nodes[2 * b], c = at_nodes[2 * b + 1];
          const Pole<T> pole(w_re, w_im, s, c);
          for (int64_t i = 0; i < vs; ++i) {
            const T* value = v + 2 * ((h * vs + i) * N + n);
            const V d_re = grads[b * 2 * vs + 2 * i], d_im = -grads[b * 2 * vs + 2 * i + 1];
            const V g_re = d_re * pole.inverse_re - d_im * pole.inverse_im;
            const V g_im = d_re * pole.inverse_im + d_im * pole.inverse_re;
            const V m_re = c * (T(-2) * (value[0] * w_re + value[1] * w_im)), m_im = s * (T(4) * value[0]);
            const V r_re = m_re * pole.inverse_re - m_im * pole.inverse_im;
            const V r_im = m_re * pole.inverse_im + m_im * pole.inverse_re;
            const V h_re = -(g_re * r_re - g_im * r_im), h_im = -(g_re * r_im + g_im * r_re);
            const V twice = (c + c) * g_re;
            sums[2 * i] -= twice * w_re + T(4) * s * g_im;
            sums[2 * i + 1] -= twice * w_im;
            sum_re += T(2) * c * c * w_re * h_re + T(4) * s * c * h_im - twice * value[0];
            sum_im += T(2) * c * c * w_im * h_re - twice * value[1];
          }
        }
        for (int64_t i = 0; i < vs; ++i) {
          dv[2 * ((h * vs + i) * N + n)] = sum_of<T>(sums[2 * i]);
          dv[2 * ((h * vs + i) * N + n) + 1] = sum_of<T>(sums[2 * i + 1]);
        }
        dw[2 * (h * N + n)] = sum_of<T>(sum_re);
        dw[2 * (h * N + n) + 1] = sum_of<T>(sum_im);
      }
    }
  });
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

void vandermonde(Tensor c, Tensor x, Tensor k) {
  dispatch_states(c, [&](auto t) {
    using T = decltype(t);
    run_vandermonde(data<T>(c), data<T>(x), data<T>(k), c.size(0), c.size(1), k.size(1));
  });
}

void vandermonde_backward(Tensor dk, Tensor c, Tensor x, Tensor dc, Tensor dx) {
  dispatch_states(c, [&](auto t) {
    using T = decltype(t);
    run_vandermonde_backward(data<T>(dk), data<T>(c), data<T>(x), data<T>(dc), data<T>(dx), c.size(0), c.size(1),
                             dk.size(1));
  });
}

void cauchy(Tensor v, Tensor w, Tensor nodes, Tensor r) {
  dispatch_states(v, [&](auto t) {
    using T = decltype(t);
    run_cauchy(data<T>(v), data<T>(w), data<T>(nodes), data<T>(r), v.size(0), v.size(1), v.size(2), nodes.size(0));
  });
}

void cauchy_backward(Tensor dr, Tensor v, Tensor w, Tensor nodes, Tensor dv, Tensor dw) {
  dispatch_states(v, [&](auto t) {
    using T = decltype(t);
    run_cauchy_backward(data<T>(dr), data<T>(v), data<T>(w), data<T>(nodes), data<T>(dv), data<T>(dw), v.size(0),
                        v.size(1), v.size(2), nodes.size(0));
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def("vandermonde_forward(Tensor c, Tensor x, Tensor(a!) k) -> ()");
  m.def("vandermonde_backward(Tensor dk, Tensor c, Tensor x, Tensor(a!) dc, Tensor(b!) dx) -> ()");
  m.def("cauchy_forward(Tensor v, Tensor w, Tensor nodes, Tensor(a!) r) -> ()");
  m.def("cauchy_backward(Tensor dr, Tensor v, Tensor w, Tensor nodes, Tensor(a!) dv, Tensor(b!) dw) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("vandermonde_forward", TORCH_BOX(&linzoo::vandermonde));
  m.impl("vandermonde_backward", TORCH_BOX(&linzoo::vandermonde_backward));
  m.impl("cauchy_forward", TORCH_BOX(&linzoo::cauchy));
  m.impl("cauchy_backward", TORCH_BOX(&linzoo::cauchy_backward));
}
