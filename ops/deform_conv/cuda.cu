// Deformable convolution (DCNv4) on CUDA. Forward, a thread is a channel of an output pixel: the reads of a warp are
// whole rows of channels. Backward, a warp is a group of an output pixel, whose lanes walk its channels: the gradients
// of offsets and weights are sums over the lanes, that of the map is scattered by atomic additions, whose order is not
// fixed.
//
// Layouts: x (B, H, W, C), offset (B, H', W', G, K K, 2) and weight (B, H', W', G, K K) with dense taps.

#include "device.cuh"

struct Sizes {
  i64 B, H, W, C, rows, columns, G, D, K, stride, dilation, centre, first;  // D = C / G channels of a group
  double scale;
};

// A sampling point and the four pixels around it: corner n is (y + n / 2, x + n % 2).
template <class T>
struct Point {
  T x0, x1, y0, y1;               // weights of the two columns and rows, 0 for those outside
  bool left, right, top, bottom;  // inside the image?
  i64 pixel;                      // of corner 0, which may lie outside
  __device__ __forceinline__ Point(const Sizes& s, i64 r, i64 c, i64 k, const T* offset) {
    const T column = T(k / s.K * s.dilation - s.centre), row = T(k % s.K * s.dilation - s.centre);
    T x = T(c * s.stride + s.first) + T(s.scale) * (column + offset[2 * k]);
    T y = T(r * s.stride + s.first) + T(s.scale) * (row + offset[2 * k + 1]);
    if (!(x > T(-1) && y > T(-1) && x < T(s.W) && y < T(s.H))) x = y = T(-2);  // out of reach, or not a number
    const T floor_x = floor_(x), floor_y = floor_(y);
    const i64 ix = static_cast<i64>(floor_x), iy = static_cast<i64>(floor_y);
    left = ix >= 0;
    right = ix >= -1 && ix < s.W - 1;
    top = iy >= 0;
    bottom = iy >= -1 && iy < s.H - 1;
    x1 = right ? x - floor_x : T(0);
    x0 = left ? T(1) - (x - floor_x) : T(0);
    y1 = bottom ? y - floor_y : T(0);
    y0 = top ? T(1) - (y - floor_y) : T(0);
    pixel = iy * s.W + ix;
  }
  __device__ __forceinline__ bool inside(int corner) const {
    return (corner & 1 ? right : left) && (corner & 2 ? bottom : top);
  }
  __device__ __forceinline__ T share(int corner) const { return (corner & 1 ? x1 : x0) * (corner & 2 ? y1 : y0); }
  __device__ __forceinline__ i64 at(const Sizes& s, int corner) const {
    return pixel + (corner & 1) + (corner & 2 ? s.W : 0);
  }
};

template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    forward(const S* x, const T* offset_, i64 offset_batch, i64 offset_row, i64 offset_column, i64 offset_group,
            const T* weight_, i64 weight_batch, i64 weight_row, i64 weight_column, i64 weight_group, i64 B, i64 H,
            i64 W, i64 C, i64 rows, i64 columns, i64 G, i64 K, i64 stride, i64 dilation, i64 centre, i64 first,
            double scale, S* y) {
  const Sizes s{B, H, W, C, rows, columns, G, C / G, K, stride, dilation, centre, first, scale};
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= B * rows * columns * C) return;
  const i64 channel = i % C, g = channel / s.D, pixel = i / C;
  const i64 c = pixel % columns, r = pixel / columns % rows, b = pixel / (columns * rows);
  const T* offsets = offset_ + b * offset_batch + r * offset_row + c * offset_column + g * offset_group;
  const T* weights = weight_ + b * weight_batch + r * weight_row + c * weight_column + g * weight_group;
  const S* image = x + b * H * W * C + channel;
  T sum = 0;
  for (i64 k = 0; k < K * K; ++k) {
    const Point<T> p(s, r, c, k, offsets);
    T sample = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (p.inside(corner)) sample += p.share(corner) * get<T>(image + p.at(s, corner) * C);
    }
    sum += weights[k] * sample;
  }
  put(y + i, sum);
}

// dx (B, H, W, C) must hold zeros; doffset and dweight are contiguous.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy, const S* x, const T* offset_, i64 offset_batch, i64 offset_row, i64 offset_column,
             i64 offset_group, const T* weight_, i64 weight_batch, i64 weight_row, i64 weight_column, i64 weight_group,
             i64 B, i64 H, i64 W, i64 C, i64 rows, i64 columns, i64 G, i64 K, i64 stride, i64 dilation, i64 centre,
             i64 first, double scale, T* dx, T* doffset, T* dweight) {
  const Sizes s{B, H, W, C, rows, columns, G, C / G, K, stride, dilation, centre, first, scale};
  const int lane = threadIdx.x % 32;
  const i64 warp = static_cast<i64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const bool active = warp < B * rows * columns * G;
  const i64 i = active ? warp : 0;  // every lane takes part in the sums
  const i64 g = i % G, pixel = i / G, c = pixel % columns, r = pixel / columns % rows, b = pixel / (columns * rows);
  const T* offsets = offset_ + b * offset_batch + r * offset_row + c * offset_column + g * offset_group;
  const T* weights = weight_ + b * weight_batch + r * weight_row + c * weight_column + g * weight_group;
  const i64 map = b * H * W * C + g * s.D;
  for (i64 k = 0; k < K * K; ++k) {
    const Point<T> p(s, r, c, k, offsets);
    T sums[4] = {};  // of dy and each corner's pixel
    for (i64 d = lane; d < s.D && active; d += 32) {
      const T gradient = get<T>(dy + pixel * C + g * s.D + d);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (!p.inside(corner)) continue;
        const i64 at = map + p.at(s, corner) * C + d;
        sums[corner] += gradient * get<T>(x + at);
        atomicAdd(dx + at, weights[k] * p.share(corner) * gradient);
      }
    }
    const T top = p.x0 * sums[0] + p.x1 * sums[1], bottom = p.x0 * sums[2] + p.x1 * sums[3];
    const T slope = T(s.scale) * weights[k];
    const T parts[4] = {
        slope * (p.y0 * (p.right * sums[1] - p.left * sums[0]) + p.y1 * (p.right * sums[3] - p.left * sums[2])),
        slope * (p.x0 * (p.bottom * sums[2] - p.top * sums[0]) + p.x1 * (p.bottom * sums[3] - p.top * sums[1])),
        p.y0 * top + p.y1 * bottom, T(0)};
    const T sum = warp_sums(parts);
    if (!active) continue;
    if (lane == 0) doffset[(i * K * K + k) * 2] = sum;
    if (lane == 8) doffset[(i * K * K + k) * 2 + 1] = sum;
    if (lane == 16) dweight[i * K * K + k] = sum;
  }
}
