// Deformable convolution (DCNv4) on the CPU, forward and backward. Lanes are channels of one group: the taps' points
// and bilinear weights are found once per pixel and group and serve all of its channels.
//
// Forward, a task is a row of the output. Backward, a task is a group of an image and a split of the rows: it alone
// writes its channels of its split's copy of dx, so the scattered sums have a fixed order and need no atomics.

#include "../kernel.h"

namespace linzoo {
namespace {

// Offsets or weights (B, H', W', G, ...) of any dtype, whose last axes, a pixel's taps of one group, are contiguous.
class Taps {
 public:
  explicit Taps(const Tensor& t) : data_(static_cast<char*>(t.data_ptr())), type_(t.scalar_type()) {
    for (int axis = 0; axis < 4; ++axis) strides_[axis] = t.stride(axis) * t.element_size();
  }
  char* at(int64_t b, int64_t r, int64_t c, int64_t g) const {
    return data_ + b * strides_[0] + r * strides_[1] + c * strides_[2] + g * strides_[3];
  }
  // A pixel's `count` taps; `room` holds them if they are of another type than T.
  template <class T>
  const T* read(int64_t b, int64_t r, int64_t c, int64_t g, int64_t count, T* room) const {
    using torch::headeronly::ScalarType;
    const char* from = at(b, r, c, g);
    if (type_ == ScalarType::BFloat16) return convert(reinterpret_cast<const c10::BFloat16*>(from), count, room);
    if (type_ == ScalarType::Half) return convert(reinterpret_cast<const c10::Half*>(from), count, room);
    return reinterpret_cast<const T*>(from);
  }

 private:
  template <class S, class T>
  static const T* convert(const S* from, int64_t count, T* room) {
    for (int64_t i = 0; i < count; ++i) room[i] = static_cast<T>(from[i]);
    return room;
  }
  char* data_;
  torch::headeronly::ScalarType type_;
  int64_t strides_[4];
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
        scale(scale) {
    STD_TORCH_CHECK(H * W * C < int64_t(1) << 31, "x: expected less than 2^31 values an image, got ", H, " x ", W,
                    " x ", C);
  }
};

// The sampling points of successive output pixels of a row, for one group: lanes are taps of pixels, (pixel, tap).
// Corner n of a point is the pixel at (y + n / 2, x + n % 2): `corner` holds where its channels begin, moved into the
// image where it lies outside, and `share` its bilinear weight, 0 where it lies outside.
template <class T>
struct Points {
  using V = typename Simd<T>::vec;
  using I = decltype(V{} < V{});
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int width = Simd<T>::width;
  static constexpr int64_t kPixels = 32;  // at most
  const int64_t taps, size;               // size of the arrays, with room for whole vectors
  std::vector<T> centre, column, row;     // of each tap: its window's centre from the first one's, and the tap from it
  std::vector<T> dx, dy;                  // their offsets
  std::vector<T> room;                    // for taps of another type
  std::vector<Index> corner;              // (4, size)
  std::vector<T> share;                   // (4, size)
  std::vector<T> weights;  // (4, size): of the columns x, x + 1 and the rows y, y + 1, 0 for those outside
  std::vector<T> held;     // (4, size): 1 for corners inside the image, else 0
  bool inside[kPixels];    // all corners of this pixel's points lie inside the image; else unknown

  explicit Points(const Sizes& s) : taps(s.K * s.K), size(kPixels * taps + width) {
    for (auto* v : {&centre, &column, &row, &dx, &dy, &room}) v->resize(size);
    for (auto* v : {&share, &weights, &held}) v->resize(4 * size);
    corner.resize(4 * size);
    for (int64_t i = 0; i < kPixels * taps; ++i) {
      const int64_t k = i % taps;
      centre[i] = T(i / taps * s.stride);
      column[i] = T(k / s.K * s.dilation - s.centre);
      row[i] = T(k % s.K * s.dilation - s.centre);
    }
  }

  // Of `pixels` output pixels from (r, c) on. A point out of reach of the image, or not a number, gets weights of 0.
  // Without `kGradients`, only x + 1 and y + 1 have `weights`, and `held` is not set.
  template <bool kGradients>
  void locate(const Sizes& s, const Taps& offset, int64_t b, int64_t r, int64_t c, int64_t pixels, int64_t g) {
    const T first_x = T(c * s.stride + s.first), centre_y = T(r * s.stride + s.first), scale = T(s.scale);
    for (int64_t i = 0; i < pixels; ++i) {
      const T* from = offset.read(b, r, c + i, g, 2 * taps, room.data());
      inside[i] = true;
      for (int64_t k = 0; k < taps; ++k) {
        dx[i * taps + k] = from[2 * k];
        dy[i * taps + k] = from[2 * k + 1];
      }
    }
    for (int64_t i = 0; i < pixels * taps; i += width) {
      V x = (first_x + load<T>(&centre[i], width)) + scale * (load<T>(&column[i], width) + load<T>(&dx[i], width));
      V y = centre_y + scale * (load<T>(&row[i], width) + load<T>(&dy[i], width));
      const I near = (x > T(-1)) & (y > T(-1)) & (x < T(s.W)) & (y < T(s.H));
      Axis across(near ? x : broadcast<T>(-2)), down(near ? y : broadcast<T>(-2));
      if (!all((across.at[0] >= 0) & (across.at[1] < Index(s.W)) & (down.at[0] >= 0) & (down.at[1] < Index(s.H)))) {
        across.move_inside(s.W);
        down.move_inside(s.H);
        for (int64_t pixel = i / taps; pixel <= std::min((i + width - 1) / taps, pixels - 1); ++pixel) {
          inside[pixel] = false;
        }
      }
      for (int n = 0; n < 4; ++n) {
        if (kGradients || n % 2) store<T>(&weights[n * size + i], (n / 2 ? down : across).weight[n % 2], width);
        const I at = (down.at[n / 2] * Index(s.W) + across.at[n % 2]) * Index(s.C);
        std::memcpy(&corner[n * size + i], &at, sizeof at);
        store<T>(&share[n * size + i], across.weight[n % 2] * down.weight[n / 2], width);
        if (kGradients) store<T>(&held[n * size + i], across.inside[n % 2] * down.inside[n / 2], width);
      }
    }
  }

 private:
  // The two pixels around coordinates on one axis: where they are, 1 for those inside the image, else 0, and weights.
  struct Axis {
    I at[2];
    V inside[2], weight[2];
    explicit Axis(V x) {
      const V one = broadcast<T>(1);
      at[0] = __builtin_convertvector(x, I);
      at[0] += __builtin_convertvector(at[0], V) > x;  // -1 where rounding towards 0 went up
      at[1] = at[0] + 1;
      inside[0] = inside[1] = one;
      weight[1] = x - __builtin_convertvector(at[0], V);
      weight[0] = one - weight[1];
    }
    void move_inside(int64_t length) {
      for (int i = 0; i < 2; ++i) {
        const I first = {}, last = first + Index(length - 1);
        inside[i] = (at[i] >= first) & (at[i] <= last) ? inside[i] : V{};
        weight[i] *= inside[i];
        at[i] = at[i] < first ? first : at[i] > last ? last : at[i];
      }
    }
  };
};

// f(taps, inside), with `inside` as a constant, and the taps of a 3 x 3 window.
template <class F>
void for_window(int64_t taps, bool inside, F f) {
  auto with_taps = [&](auto taps) { inside ? f(taps, std::true_type{}) : f(taps, std::false_type{}); };
  const std::integral_constant<int64_t, 9> nine;
  taps == nine ? with_taps(nine) : with_taps(taps);
}

template <class T, class S>
void run_forward(const S* x, const Taps& offset, const Taps& weight, S* y, const Sizes& s) {
  using V = typename Simd<T>::vec;
  torch::stable::parallel_for(0, s.B * s.rows, 1, [&](int64_t begin, int64_t end) {
    Points<T> p(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.rows, r = task % s.rows;
      const S* image = x + b * s.H * s.W * s.C;
      for (int64_t first = 0; first < s.columns; first += p.kPixels) {
        const int64_t pixels = std::min(p.kPixels, s.columns - first);
        for (int64_t g = 0; g < s.G; ++g) {
          p.template locate<false>(s, offset, b, r, first, pixels, g);
          for (int64_t i = 0; i < pixels; ++i) {
            const T* w = weight.read(b, r, first + i, g, p.taps, p.room.data());
            S* out = y + (task * s.columns + first + i) * s.C;
            for_window(p.taps, p.inside[i], [&](auto taps, auto inside) {
              const auto* corners = p.corner.data() + i * taps;
              const T *shares = p.share.data() + i * taps, *weights = p.weights.data() + i * taps;
              by_channels<T>(g * s.D, (g + 1) * s.D, [&](int64_t d, auto lanes) {
                V sum = {};
                for (int64_t k = 0; k < taps; ++k) {
                  if constexpr (inside) {
                    const S *above = image + corners[k] + d, *below = above + s.W * s.C;
                    const V v0 = load<T>(above, lanes), v1 = load<T>(above + s.C, lanes);
                    const V v2 = load<T>(below, lanes), v3 = load<T>(below + s.C, lanes);
                    const T x1 = weights[p.size + k], y1 = weights[3 * p.size + k];
                    const V upper = v0 + x1 * (v1 - v0), lower = v2 + x1 * (v3 - v2);
                    sum += w[k] * (upper + y1 * (lower - upper));
                  } else {
                    for (int n = 0; n < 4; ++n) {
                      const T share = shares[n * p.size + k];
                      if (share != T(0)) sum += w[k] * share * load<T>(image + corners[n * p.size + k] + d, lanes);
                    }
                  }
                }
                store<T>(out + d, sum, lanes);
              });
            });
          }
        }
      }
    }
  });
}

// dx: (splits, B, H, W, C), one copy for each split of the rows.
template <class S, class T>
void run_backward(const S* dy, const S* x, const Taps& offset, const Taps& weight, T* dx, const Taps& doffset,
                  const Taps& dweight, const Sizes& s, int64_t splits) {
  using V = typename Simd<T>::vec;
  constexpr int width = Simd<T>::width;
  const int64_t split_rows = (s.rows + splits - 1) / splits, image_size = s.H * s.W * s.C;
  torch::stable::parallel_for(0, splits * s.B * s.G, 1, [&](int64_t begin, int64_t end) {
    Points<T> p(s);
    const int64_t sums = (4 * p.taps + width - 1) / width * width;
    std::vector<V> products(sums);             // of dy and each corner's pixel, to be summed over channels
    std::vector<T> summed(4 * p.size + sums);  // (pixel, tap, corner)
    std::vector<T> to_x(p.size), to_y(p.size), to_weight(p.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task % s.G, b = task / s.G % s.B, split = task / (s.G * s.B);
      const S* image = x + b * image_size;
      T* dimage = dx + (split * s.B + b) * image_size;
      for (int64_t pixel = 0; pixel < s.H * s.W; ++pixel) {
        std::fill_n(dimage + pixel * s.C + g * s.D, s.D, T(0));
      }
      for (int64_t r = split * split_rows; r < std::min(s.rows, (split + 1) * split_rows); ++r) {
        for (int64_t start = 0; start < s.columns; start += p.kPixels) {
          const int64_t pixels = std::min(p.kPixels, s.columns - start), first = g * s.D;
          p.template locate<true>(s, offset, b, r, start, pixels, g);
          for (int64_t i = 0; i < pixels; ++i) {
            const T* w = weight.read(b, r, start + i, g, p.taps, p.room.data());
            const S* gradient = dy + ((b * s.rows + r) * s.columns + start + i) * s.C;
            for_window(p.taps, p.inside[i], [&](auto taps, auto inside) {
              const auto* corners = p.corner.data() + i * taps;
              const T *shares = p.share.data() + i * taps, *held = p.held.data() + i * taps;
              by_channels<T>(first, first + s.D, [&](int64_t d, auto lanes) {
                const V dv = load<T>(gradient + d, lanes);
                for (int64_t k = 0; k < taps; ++k) {
                  for (int n = 0; n < 4; ++n) {
                    V& product = products[4 * k + n];
                    if (d == first) product = V{};
                    if (!inside && held[n * p.size + k] == T(0)) continue;
                    const int64_t at = corners[n * p.size + k] + d;
                    product += dv * load<T>(image + at, lanes);
                    store<T>(dimage + at, load<T>(dimage + at, lanes) + (w[k] * shares[n * p.size + k]) * dv, lanes);
                  }
                }
              });
            });
            sum_lanes<T>(products.data(), sums, summed.data() + 4 * p.taps * i);
          }
          const T *x0 = p.weights.data(), *x1 = x0 + p.size, *y0 = x1 + p.size, *y1 = y0 + p.size;
          for (int64_t i = 0; i < pixels * p.taps; ++i) {  // products of corners outside are 0
            const T* n = summed.data() + 4 * i;
            to_x[i] = T(s.scale) * (y0[i] * (n[1] - n[0]) + y1[i] * (n[3] - n[2]));
            to_y[i] = T(s.scale) * (x0[i] * (n[2] - n[0]) + x1[i] * (n[3] - n[1]));
            to_weight[i] = x0[i] * (y0[i] * n[0] + y1[i] * n[2]) + x1[i] * (y0[i] * n[1] + y1[i] * n[3]);
          }
          for (int64_t i = 0; i < pixels; ++i) {
            const T* w = weight.read(b, r, start + i, g, p.taps, p.room.data());
            T* d_o = reinterpret_cast<T*>(doffset.at(b, r, start + i, g));
            T* d_w = reinterpret_cast<T*>(dweight.at(b, r, start + i, g));
            for (int64_t k = 0; k < p.taps; ++k) {
              d_o[2 * k] = w[k] * to_x[i * p.taps + k];
              d_o[2 * k + 1] = w[k] * to_y[i * p.taps + k];
              d_w[k] = to_weight[i * p.taps + k];
            }
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
    run_forward<T>(static_cast<const S*>(x.data_ptr()), Taps(offset), Taps(weight), static_cast<S*>(y.data_ptr()),
                   sizes);
  });
}

void backward(Tensor dy, Tensor x, Tensor offset, Tensor weight, int64_t stride, int64_t padding, int64_t dilation,
              double scale, Tensor dx, Tensor doffset, Tensor dweight) {
  const Sizes sizes(x, weight, stride, padding, dilation, scale);
  dispatch(x, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    run_backward(static_cast<const S*>(dy.data_ptr()), static_cast<const S*>(x.data_ptr()), Taps(offset), Taps(weight),
                 static_cast<T*>(dx.data_ptr()), Taps(doffset), Taps(dweight), sizes, dx.size(0));
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
