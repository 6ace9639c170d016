// Deformable convolution (DCNv4) on the CPU, forward and backward. Lanes are channels of one group: the taps' points and
// bilinear weights are found once per pixel and group and serve all of its channels.
//
// Forward, a task is a row of the output. Backward, a task is a group of an image and a split of the rows: it alone
// writes its channels of its split's copy of dx, so the scattered sums have a fixed order and need no atomics.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../simd.h"

namespace linzoo {
namespace {

using torch::stable::Tensor;

// Offsets or weights (B, H', W', G, ...) whose last axes, a pixel's taps of one group, are contiguous.
template <class T>
struct Taps {
  T* data;
  int64_t batch, row, column, group;
  explicit Taps(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())), batch(t.stride(0)), row(t.stride(1)), column(t.stride(2)), group(t.stride(3)) {}
  T* at(int64_t b, int64_t r, int64_t c, int64_t g) const {
    return data + b * batch + r * row + c * column + g * group;
  }
};

struct Sizes {
  int64_t B, H, W, C, rows, columns, G, D, K;  // D = C / G channels of a group; K x K taps
  int64_t stride, dilation, centre;
  int64_t first;  // output column c is centred at c * stride + first
  double scale;
  Sizes(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation, double scale)
      : B(x.size(0)), H(x.size(1)), W(x.size(2)), C(x.size(3)), rows(weight.size(1)), columns(weight.size(2)),
        G(weight.size(3)), D(C / G), K(std::lround(std::sqrt(static_cast<double>(weight.size(4))))), stride(stride),
        dilation(dilation), centre(dilation * (K - 1) / 2), first(centre - padding), scale(scale) {}
};

// The sampling points of one output pixel and group. Corner n of a point is the pixel at (y + n / 2, x + n % 2): `pixel`
// holds its index, moved into the image where it lies outside, and `share` its bilinear weight, 0 where it lies outside.
template <class T>
struct Points {
  int64_t taps;
  std::vector<T> column, row;  // of each tap in the window, from the window's centre
  std::vector<T> x0, x1, y0, y1;  // weights of the two columns and rows around the point, 0 for those outside
  std::vector<T> left, right, top, bottom;  // 1 for columns and rows inside the image, else 0
  std::vector<int32_t> pixel[4];
  std::vector<T> share[4];

  explicit Points(const Sizes& s) : taps(s.K * s.K) {
    for (auto* v : {&column, &row, &x0, &x1, &y0, &y1, &left, &right, &top, &bottom}) v->resize(taps);
    for (auto& v : pixel) v.resize(taps);
    for (auto& v : share) v.resize(taps);
    for (int64_t k = 0; k < taps; ++k) {
      column[k] = T(k / s.K * s.dilation - s.centre);
      row[k] = T(k % s.K * s.dilation - s.centre);
    }
  }

  // A point out of reach of the image, or not a number, gets weights of 0.
  void locate(const Sizes& s, int64_t r, int64_t c, const T* offset) {
    const T centre_x = T(c * s.stride + s.first), centre_y = T(r * s.stride + s.first), scale = T(s.scale);
    const T W = T(s.W), H = T(s.H);
    const int32_t last_x = static_cast<int32_t>(s.W - 1), last_y = static_cast<int32_t>(s.H - 1);
    const int32_t width = static_cast<int32_t>(s.W);
    for (int64_t k = 0; k < taps; ++k) {
      T x = centre_x + scale * (column[k] + offset[2 * k]), y = centre_y + scale * (row[k] + offset[2 * k + 1]);
      const bool near = (x > T(-1)) & (y > T(-1)) & (x < W) & (y < H);
      x = near ? x : T(-2);
      y = near ? y : T(-2);
      const T floor_x = std::floor(x), floor_y = std::floor(y);
      const int32_t ix = static_cast<int32_t>(floor_x), iy = static_cast<int32_t>(floor_y);
      left[k] = ix >= 0 ? T(1) : T(0);
      right[k] = (ix >= -1) & (ix < last_x) ? T(1) : T(0);
      top[k] = iy >= 0 ? T(1) : T(0);
      bottom[k] = (iy >= -1) & (iy < last_y) ? T(1) : T(0);
      x1[k] = (x - floor_x) * right[k];
      x0[k] = (T(1) - (x - floor_x)) * left[k];
      y1[k] = (y - floor_y) * bottom[k];
      y0[k] = (T(1) - (y - floor_y)) * top[k];
      const int32_t a = ix < 0 ? 0 : ix, b = ix < last_x ? (ix + 1 < 0 ? 0 : ix + 1) : last_x;
      const int32_t u = iy < 0 ? 0 : iy, v = iy < last_y ? (iy + 1 < 0 ? 0 : iy + 1) : last_y;
      pixel[0][k] = u * width + a;
      pixel[1][k] = u * width + b;
      pixel[2][k] = v * width + a;
      pixel[3][k] = v * width + b;
      share[0][k] = x0[k] * y0[k];
      share[1][k] = x1[k] * y0[k];
      share[2][k] = x0[k] * y1[k];
      share[3][k] = x1[k] * y1[k];
    }
  }
};

template <class S, class T>
void run_forward(const S* x, const Taps<T>& offset, const Taps<T>& weight, S* y, const Sizes& s) {
  constexpr int width = Simd<T>::width;
  torch::stable::parallel_for(0, s.B * s.rows, 1, [&](int64_t begin, int64_t end) {
    Points<T> p(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.rows, r = task % s.rows;
      const S* image = x + b * s.H * s.W * s.C;
      for (int64_t c = 0; c < s.columns; ++c) {
        for (int64_t g = 0; g < s.G; ++g) {
          const T* w = weight.at(b, r, c, g);
          p.locate(s, r, c, offset.at(b, r, c, g));
          for (int64_t d = g * s.D; d < (g + 1) * s.D; d += width) {
            const int lanes = static_cast<int>(std::min<int64_t>(width, (g + 1) * s.D - d));
            typename Simd<T>::vec sum = {};
            for (int64_t k = 0; k < p.taps; ++k) {
              typename Simd<T>::vec sample = {};
              for (int corner = 0; corner < 4; ++corner) {
                const T share = p.share[corner][k];
                if (share != T(0)) sample += share * load<T>(image + p.pixel[corner][k] * s.C + d, lanes);
              }
              sum += w[k] * sample;
            }
            store<T>(y + ((b * s.rows + r) * s.columns + c) * s.C + d, sum, lanes);
          }
        }
      }
    }
  });
}

// dx: (splits, B, H, W, C), one copy for each split of the rows.
template <class S, class T>
void run_backward(const S* dy, const S* x, const Taps<T>& offset, const Taps<T>& weight, T* dx, const Taps<T>& doffset,
                  const Taps<T>& dweight, const Sizes& s, int64_t splits) {
  using V = typename Simd<T>::vec;
  constexpr int width = Simd<T>::width;
  const int64_t split_rows = (s.rows + splits - 1) / splits, image_size = s.H * s.W * s.C;
  torch::stable::parallel_for(0, splits * s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    Points<T> p(s);
    const int64_t corners = (4 * p.taps + width - 1) / width * width;
    std::vector<V> products(corners);  // of dy and each corner's pixel, to be summed over channels
    std::vector<T> q(corners);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task % s.G, b = task / s.G % s.B, split = task / (s.G * s.B);
      const S* image = x + b * image_size;
      T* dimage = dx + (split * s.B + b) * image_size;
      for (int64_t pixel = 0; pixel < s.H * s.W; ++pixel) {
        std::fill_n(dimage + pixel * s.C + g * s.D, s.D, T(0));
      }
      for (int64_t r = split * split_rows; r < std::min(s.rows, (split + 1) * split_rows); ++r) {
        for (int64_t c = 0; c < s.columns; ++c) {
          const T* w = weight.at(b, r, c, g);
          const S* gradient = dy + ((b * s.rows + r) * s.columns + c) * s.C;
          p.locate(s, r, c, offset.at(b, r, c, g));
          std::fill(products.begin(), products.end(), V{});
          for (int64_t d = g * s.D; d < (g + 1) * s.D; d += width) {
            const int lanes = static_cast<int>(std::min<int64_t>(width, (g + 1) * s.D - d));
            const V dv = load<T>(gradient + d, lanes);
            for (int64_t k = 0; k < p.taps; ++k) {
              for (int corner = 0; corner < 4; ++corner) {
                if ((corner & 1 ? p.right : p.left)[k] * (corner & 2 ? p.bottom : p.top)[k] == T(0)) continue;
                const int64_t at = p.pixel[corner][k] * s.C + d;
                products[4 * k + corner] += dv * load<T>(image + at, lanes);
                store<T>(dimage + at, load<T>(dimage + at, lanes) + (w[k] * p.share[corner][k]) * dv, lanes);
              }
            }
          }
          sum_lanes<T>(products.data(), corners, q.data());
          T *d_o = doffset.at(b, r, c, g), *d_w = dweight.at(b, r, c, g);
          for (int64_t k = 0; k < p.taps; ++k) {
            const T *n = q.data() + 4 * k, slope = T(s.scale) * w[k];
            d_o[2 * k] = slope * (p.y0[k] * (p.right[k] * n[1] - p.left[k] * n[0]) +
                                  p.y1[k] * (p.right[k] * n[3] - p.left[k] * n[2]));
            d_o[2 * k + 1] = slope * (p.x0[k] * (p.bottom[k] * n[2] - p.top[k] * n[0]) +
                                      p.x1[k] * (p.bottom[k] * n[3] - p.top[k] * n[1]));
            d_w[k] = p.x0[k] * (p.y0[k] * n[0] + p.y1[k] * n[2]) + p.x1[k] * (p.y0[k] * n[1] + p.y1[k] * n[3]);
          }
        }
      }
    }
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
    default: STD_TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16");
  }
}

void forward(Tensor x, Tensor offset, Tensor weight, int64_t stride, int64_t padding, int64_t dilation, double scale,
             Tensor y) {
  const Sizes sizes(x, weight, stride, padding, dilation, scale);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_forward(static_cast<const S*>(x.data_ptr()), Taps<T>(offset), Taps<T>(weight), static_cast<S*>(y.data_ptr()), sizes);
  });
}

void backward(Tensor dy, Tensor x, Tensor offset, Tensor weight, int64_t stride, int64_t padding, int64_t dilation,
              double scale, Tensor dx, Tensor doffset, Tensor dweight) {
  const Sizes sizes(x, weight, stride, padding, dilation, scale);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_backward(static_cast<const S*>(dy.data_ptr()), static_cast<const S*>(x.data_ptr()), Taps<T>(offset),
                 Taps<T>(weight), static_cast<T*>(dx.data_ptr()), Taps<T>(doffset), Taps<T>(dweight), sizes, dx.size(0));
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def(
      "deform_conv_forward(Tensor x, Tensor offset, Tensor weight, int stride, int padding, int dilation, float scale, "
      "Tensor(a!) y) -> ()");
  m.def(
      "deform_conv_backward(Tensor dy, Tensor x, Tensor offset, Tensor weight, int stride, int padding, int dilation, "
      "float scale, Tensor(a!) dx, Tensor(b!) doffset, Tensor(c!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) {
  m.impl("deform_conv_forward", TORCH_BOX(&linzoo::forward));
  m.impl("deform_conv_backward", TORCH_BOX(&linzoo::backward));
}
