// The gradient of a depthwise convolution's weights on the CPU. Lanes are channels. A task is a vector of channels in a
// band of an image's output rows. It copies the rows that the band reads into a dense patch with zeros around the
// image, so that the inner loop meets neither borders nor strides.

#include "../kernel.h"

namespace linzoo {
namespace {

constexpr int kTogether = 9;  // taps whose gradients are summed at once

struct Sizes {
  int64_t B, H, W, C, rows, columns, kernel_rows, kernel_columns, pad_rows, pad_columns, dilation, band;
  int64_t taps, bands, width;  // columns of a patch
  Sizes(const Tensor& x, const Tensor& dy, int64_t kernel_rows, int64_t kernel_columns, int64_t pad_rows,
        int64_t pad_columns, int64_t dilation, int64_t band)
      : B(x.size(0)),
        H(x.size(1)),
        W(x.size(2)),
        C(x.size(3)),
        rows(dy.size(1)),
        columns(dy.size(2)),
        kernel_rows(kernel_rows),
        kernel_columns(kernel_columns),
        pad_rows(pad_rows),
        pad_columns(pad_columns),
        dilation(dilation),
        band(band),
        taps(kernel_rows * kernel_columns),
        bands((rows + band - 1) / band),
        width(columns + dilation * (kernel_columns - 1)) {}
};

// A channel-last map (B, H, W, C) whose channels are contiguous.
template <class S>
struct Map {
  const S* data;
  int64_t batch, row, column;
  explicit Map(const Tensor& t)
      : data(static_cast<const S*>(t.data_ptr())), batch(t.stride(0)), row(t.stride(1)), column(t.stride(2)) {}
  const S* at(int64_t b, int64_t r, int64_t c) const { return data + b * batch + r * row + c * column; }
};

// sums (B, bands, taps + 1, C): of the gradients of the weights and of the bias.
template <class S, class T>
void run_backward(const Map<S>& dy, const Map<S>& x, T* sums, const Sizes& s) {
  using V = typename Simd<T>::vec;
  constexpr int W = Simd<T>::width;
  const int64_t blocks = (s.C + W - 1) / W, reach = s.dilation * (s.kernel_rows - 1);
  std::vector<int64_t> offsets;  // of each tap in a patch
  for (int64_t k = 0; k < s.taps; ++k)
    offsets.push_back((k / s.kernel_columns * s.width + k % s.kernel_columns) * s.dilation);
  torch::stable::parallel_for(0, s.B * s.bands * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> patch((s.band + reach) * s.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % blocks * W, part = task / blocks, b = part / s.bands;
      const int64_t first = part % s.bands * s.band, rows = std::min(s.band, s.rows - first);
      const int lanes = static_cast<int>(std::min<int64_t>(W, s.C - channel));
      for (int64_t r = 0; r < rows + reach; ++r) {
        for (int64_t c = 0; c < s.width; ++c) {
          const int64_t row = first + r - s.pad_rows, column = c - s.pad_columns;
          const bool inside = row >= 0 && row < s.H && column >= 0 && column < s.W;
          patch[r * s.width + c] = inside ? load<T>(x.at(b, row, column) + channel, lanes) : V{};
        }
      }
      T* out = sums + part * (s.taps + 1) * s.C + channel;
      V bias = {};
      auto sum = [&](int64_t k, auto count) {
        V dw[count] = {};
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < s.columns; ++c) {
            const V g = load<T>(dy.at(b, first + r, c) + channel, lanes), *from = &patch[r * s.width + c];
            if (k == 0) bias += g;
            for (int i = 0; i < count; ++i) dw[i] += g * from[offsets[k + i]];
          }
        }
        for (int i = 0; i < count; ++i) store<T>(out + (k + i) * s.C, dw[i], lanes);
      };
      int64_t k = 0;
      for (; k + kTogether <= s.taps; k += kTogether) sum(k, std::integral_constant<int, kTogether>{});
      for (; k < s.taps; ++k) sum(k, std::integral_constant<int, 1>{});
      store<T>(out + s.taps * s.C, bias, lanes);
    }
  });
}

void backward(Tensor dy, Tensor x, int64_t kernel_rows, int64_t kernel_columns, int64_t pad_rows, int64_t pad_columns,
              int64_t dilation, int64_t band, Tensor sums) {
  const Sizes s(x, dy, kernel_rows, kernel_columns, pad_rows, pad_columns, dilation, band);
  dispatch(x, [&](auto a, auto t) {
    using S = decltype(a);
    using T = decltype(t);
    run_backward(Map<S>(dy), Map<S>(x), static_cast<T*>(sums.data_ptr()), s);
  });
}

}  // namespace
}  // namespace linzoo

STABLE_TORCH_LIBRARY_FRAGMENT(linzoo_cpu, m) {
  m.def(
      "depthwise_conv2d_backward(Tensor dy, Tensor x, int kernel_rows, int kernel_columns, int pad_rows, "
      "int pad_columns, int dilation, int band, Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(linzoo_cpu, CPU, m) { m.impl("depthwise_conv2d_backward", TORCH_BOX(&linzoo::backward)); }
