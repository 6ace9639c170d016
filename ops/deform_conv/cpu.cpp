// Deformable convolution (DCNv4) on the CPU, forward and backward. Lanes are channels of one group: the taps' points
// and bilinear weights are found once per pixel and group and serve all of its channels.
//
// Forward, a task is a row of the output. Backward, a task is a group of an image and a split of the rows: it alone
// writes its channels of its split's copy of dx, so the scattered sums have a fixed order and need no atomics.

#include "../kernel.h"

namespace linzoo {
namespace {

// Offsets or weights (B, H', W', G, ...) whose last axes, a pixel's taps of one group, are contiguous.
template <class T>
struct Taps {
  T* data;
  int64_t batch, row, column, group;
  explicit Taps(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())),
        batch(t.stride(0)),
        row(t.stride(1)),
        column(t.stride(2)),
        group(t.stride(3)) {}
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
      : B(x.size(0)),
        H(x.size(1)),
        W(x.size(2)),
        C(x.size(3)),
        rows(weight.size(1)),
        columns(weight.size(2)),
        G(weight.size(3)),
        D(C / G),
        K(std::lround(std::sqrt(static_cast<double>(weight.size(4))))),
        stride(stride),
        dilation(dilation),
        centre(dilation * (K - 1) / 2),
        first(centre - padding),
        scale(scale) {}
};

// The sampling points of one output pixel and group, found a vector of taps at a time. Corner n of a point is the pixel
// at (y + n / 2, x + n % 2): `pixel` holds its index, moved into the image where it lies outside, and `share` its
// bilinear weight, 0 where it lies outside.
template <class T>
struct Points {
  using V = typename Simd<T>::vec;
  using I = decltype(V{} < V{});
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int width = Simd<T>::width;
  int64_t taps;
  std::vector<T> column, row;               // of each tap in the window, from the window's centre
  std::vector<T> dx, dy;                    // their offsets
  std::vector<T> x0, x1, y0, y1;            // weights of the two columns and rows around the point, 0 for those outside
  std::vector<T> left, right, top, bottom;  // 1 for columns and rows inside the image, else 0
  std::vector<Index> pixel[4];
  std::vector<T> share[4];

  explicit Points(const Sizes& s) : taps(s.K * s.K) {
    const int64_t padded = (taps + width - 1) / width * width;
    for (auto* v : {&column, &row, &dx, &dy, &x0, &x1, &y0, &y1, &left, &right, &top, &bottom}) v->resize(padded);
    for (auto& v : pixel) v.resize(padded);
    for (auto& v : share) v.resize(padded);
    for (int64_t k = 0; k < taps; ++k) {
      column[k] = T(k / s.K * s.dilation - s.centre);
      row[k] = T(k % s.K * s.dilation - s.centre);
    }
  }

  // A point out of reach of the image, or not a number, gets weights of 0.
  void locate(const Sizes& s, int64_t r, int64_t c, const T* offset) {
    const T centre_x = T(c * s.stride + s.first), centre_y = T(r * s.stride + s.first), scale = T(s.scale);
    for (int64_t k = 0; k < taps; ++k) {
      dx[k] = offset[2 * k];
      dy[k] = offset[2 * k + 1];
    }
    for (int64_t k = 0; k < taps; k += width) {
      V x = centre_x + scale * (load<T>(&column[k], width) + load<T>(&dx[k], width));
      V y = centre_y + scale * (load<T>(&row[k], width) + load<T>(&dy[k], width));
      const I near = (x > T(-1)) & (y > T(-1)) & (x < T(s.W)) & (y < T(s.H));
      x = near ? x : broadcast<T>(-2);
      y = near ? y : broadcast<T>(-2);
      const Axis across(x, Index(s.W)), down(y, Index(s.H));
      for (int n = 0; n < 4; ++n) {
        const I at = down.at[n / 2] * Index(s.W) + across.at[n % 2];
        std::memcpy(&pixel[n][k], &at, sizeof at);
        store<T>(&share[n][k], across.weight[n % 2] * down.weight[n / 2], width);
      }
      store<T>(&x0[k], across.weight[0], width);
      store<T>(&x1[k], across.weight[1], width);
      store<T>(&y0[k], down.weight[0], width);
      store<T>(&y1[k], down.weight[1], width);
      store<T>(&left[k], across.inside[0], width);
      store<T>(&right[k], across.inside[1], width);
      store<T>(&top[k], down.inside[0], width);
      store<T>(&bottom[k], down.inside[1], width);
    }
  }

 private:
  // The two pixels around coordinates on one axis of `length` pixels: where they are, moved inside; 1 for those that
  // lay inside, else 0; and their weights.
  struct Axis {
    I at[2];
    V inside[2], weight[2];
    Axis(V x, Index length) {
      I i = __builtin_convertvector(x, I);
      i += __builtin_convertvector(i, V) > x;  // -1 where rounding towards 0 went up
      const V fraction = x - __builtin_convertvector(i, V), one = broadcast<T>(1), zero = {};
      const Index last = length - 1;
      inside[0] = i >= 0 ? one : zero;
      inside[1] = (i >= -1) & (i < last) ? one : zero;
      weight[0] = (one - fraction) * inside[0];
      weight[1] = fraction * inside[1];
      const I none = {}, next = i + 1;
      at[0] = i < 0 ? none : i;
      at[1] = next < 0 ? none : next > last ? none + last : next;
    }
  };
};

// f(d, lanes) for the channels begin to end, a vector at a time; `lanes` is a constant wherever a vector is full.
template <class T, class F>
void by_channels(int64_t begin, int64_t end, F f) {
  constexpr int width = Simd<T>::width;
  for (; begin + width <= end; begin += width) f(begin, std::integral_constant<int, width>{});
  if (begin < end) f(begin, static_cast<int>(end - begin));
}

template <class S, class T>
void run_forward(const S* x, const Taps<T>& offset, const Taps<T>& weight, S* y, const Sizes& s) {
  using V = typename Simd<T>::vec;
  torch::stable::parallel_for(0, s.B * s.rows, 1, [&](int64_t begin, int64_t end) {
    Points<T> p(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.rows, r = task % s.rows;
      const S* image = x + b * s.H * s.W * s.C;
      for (int64_t c = 0; c < s.columns; ++c) {
        for (int64_t g = 0; g < s.G; ++g) {
          const T* w = weight.at(b, r, c, g);
          p.locate(s, r, c, offset.at(b, r, c, g));
          by_channels<T>(g * s.D, (g + 1) * s.D, [&](int64_t d, auto lanes) {
            V sum = {};
            for (int64_t k = 0; k < p.taps; ++k) {
              V sample = {};
              for (int corner = 0; corner < 4; ++corner) {
                const T share = p.share[corner][k];
                if (share != T(0)) sample += share * load<T>(image + p.pixel[corner][k] * s.C + d, lanes);
              }
              sum += w[k] * sample;
            }
            store<T>(y + ((b * s.rows + r) * s.columns + c) * s.C + d, sum, lanes);
          });
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
          by_channels<T>(g * s.D, (g + 1) * s.D, [&](int64_t d, auto lanes) {
            const V dv = load<T>(gradient + d, lanes);
            for (int64_t k = 0; k < p.taps; ++k) {
              for (int corner = 0; corner < 4; ++corner) {
                if ((corner & 1 ? p.right : p.left)[k] * (corner & 2 ? p.bottom : p.top)[k] == T(0)) continue;
                const int64_t at = p.pixel[corner][k] * s.C + d;
                products[4 * k + corner] += dv * load<T>(image + at, lanes);
                store<T>(dimage + at, load<T>(dimage + at, lanes) + (w[k] * p.share[corner][k]) * dv, lanes);
              }
            }
          });
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

void forward(Tensor x, Tensor offset, Tensor weight, int64_t stride, int64_t padding, int64_t dilation, double scale,
             Tensor y) {
  const Sizes sizes(x, weight, stride, padding, dilation, scale);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_forward(static_cast<const S*>(x.data_ptr()), Taps<T>(offset), Taps<T>(weight), static_cast<S*>(y.data_ptr()),
                sizes);
  });
}

void backward(Tensor dy, Tensor x, Tensor offset, Tensor weight, int64_t stride, int64_t padding, int64_t dilation,
              double scale, Tensor dx, Tensor doffset, Tensor dweight) {
  const Sizes sizes(x, weight, stride, padding, dilation, scale);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_backward(static_cast<const S*>(dy.data_ptr()), static_cast<const S*>(x.data_ptr()), Taps<T>(offset),
                 Taps<T>(weight), static_cast<T*>(dx.data_ptr()), Taps<T>(doffset), Taps<T>(dweight), sizes,
                 dx.size(0));
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
