// Deformable convolution (DCNv4) on CUDA. Forward, a thread has V channels of an output pixel: the reads of a warp are
// whole rows of channels. Backward, kLanes threads have a group of an output pixel and walk its channels: the gradients
// of offsets and weights are sums over them, that of the map is scattered by atomic additions, whose order is not
// fixed.
//
// Layouts: x (B, H, W, C), offset (B, H', W', G, K K, 2) and weight (B, H', W', G, K K) with dense taps.

#include "device.cuh"

struct Sizes {
  int H, W, stride, dilation, centre, first;
  double scale;
  __device__ __forceinline__ Sizes(i64 H, i64 W, i64 stride, i64 dilation, i64 centre, i64 first, double scale)
      : H(static_cast<int>(H)),
        W(static_cast<int>(W)),
        stride(static_cast<int>(stride)),
        dilation(static_cast<int>(dilation)),
        centre(static_cast<int>(centre)),
        first(static_cast<int>(first)),
        scale(scale) {}
};

// A sampling point and the four pixels around it: corner n is (y + n / 2, x + n % 2).
template <class T>
struct Point {
  T x0, x1, y0, y1;               // weights of the two columns and rows, 0 for those outside
  bool left, right, top, bottom;  // inside the image?
  int pixel;                      // of corner 0, which may lie outside
  __device__ __forceinline__ Point(const Sizes& s, int r, int c, int tap_column, int tap_row, T offset_x, T offset_y) {
    T x = T(c * s.stride + s.first) + T(s.scale) * (T(tap_column * s.dilation - s.centre) + offset_x);
    T y = T(r * s.stride + s.first) + T(s.scale) * (T(tap_row * s.dilation - s.centre) + offset_y);
    if (!(x > T(-1) && y > T(-1) && x < T(s.W) && y < T(s.H))) x = y = T(-2);  // out of reach, or not a number
    const T floor_x = floor_(x), floor_y = floor_(y);
    const int ix = static_cast<int>(floor_x), iy = static_cast<int>(floor_y);
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
  __device__ __forceinline__ int at(const Sizes& s, int corner) const {
    return pixel + (corner & 1) + (corner & 2 ? s.W : 0);
  }
};

// The four pixels' channels, 0 for those outside.
template <class T, int V, class S>
__device__ __forceinline__ void read_corners(T (&out)[4][V], const Tokens<const S>& map, const Sizes& s,
                                             const Point<T>& p) {
  Pack<S, V> packs[4] = {};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (p.inside(corner)) packs[corner] = read<V>(map.at(p.at(s, corner)));
  }
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) unpack(out[corner], packs[corner]);
}

template <class S, class T, int K, int V>
__global__ void __launch_bounds__(kThreads)
    forward(const S* x, const T* offset_, i64 offset_batch, i64 offset_row, i64 offset_column, i64 offset_group,
            const T* weight_, i64 weight_batch, i64 weight_row, i64 weight_column, i64 weight_group, i64 B, i64 H,
            i64 W, i64 C, i64 rows, i64 columns, i64 G, i64 stride, i64 dilation, i64 centre, i64 first, double scale,
            S* y) {
  const Sizes s(H, W, stride, dilation, centre, first, scale);
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= B * rows * columns * (C / V)) return;
  const i64 channel = i % (C / V) * V, g = channel / (C / G), pixel = i / (C / V);
  const i64 c = pixel % columns, r = pixel / columns % rows, b = pixel / (columns * rows);
  const T* offsets = offset_ + b * offset_batch + r * offset_row + c * offset_column + g * offset_group;
  const T* weights = weight_ + b * weight_batch + r * weight_row + c * weight_column + g * weight_group;
  const Tokens<const S> map(x, b * H * W * C + channel, C);
  T sum[V] = {};
#pragma unroll
  for (int k = 0; k < K * K; ++k) {
    const Point<T> p(s, static_cast<int>(r), static_cast<int>(c), k / K, k % K, offsets[2 * k], offsets[2 * k + 1]);
    const T weight = weights[k];
    T corners[4][V];
    read_corners(corners, map, s, p);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight * p.share(corner) * corners[corner][v];
    }
  }
  write(y + i * V, sum);
}

// dx (B, H, W, C) must hold zeros; doffset and dweight are contiguous.
template <class S, class T, int K, int V, int kLanes>
__global__ void __launch_bounds__(kThreads)
    backward(const S* dy, const S* x, const T* offset_, i64 offset_batch, i64 offset_row, i64 offset_column,
             i64 offset_group, const T* weight_, i64 weight_batch, i64 weight_row, i64 weight_column, i64 weight_group,
             i64 B, i64 H, i64 W, i64 C, i64 rows, i64 columns, i64 G, i64 stride, i64 dilation, i64 centre, i64 first,
             double scale, T* dx, T* doffset, T* dweight) {
  const Sizes s(H, W, stride, dilation, centre, first, scale);
  const int lane = threadIdx.x % kLanes;
  const i64 D = C / G, own = static_cast<i64>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool active = own < B * rows * columns * G;
  const i64 i = active ? own : 0;  // every thread takes part in the sums
  const i64 g = i % G, pixel = i / G, c = pixel % columns, r = pixel / columns % rows, b = pixel / (columns * rows);
  const T* offsets = offset_ + b * offset_batch + r * offset_row + c * offset_column + g * offset_group;
  const T* weights = weight_ + b * weight_batch + r * weight_row + c * weight_column + g * weight_group;
#pragma unroll 1
  for (int k = 0; k < K * K; ++k) {
    const Point<T> p(s, static_cast<int>(r), static_cast<int>(c), k / K, k % K, offsets[2 * k], offsets[2 * k + 1]);
    const T weight = weights[k];
    T sums[4] = {};  // of dy and each corner's pixel
    for (i64 d = lane * V; d < D && active; d += kLanes * V) {
      T gradient[V], corners[4][V];
      unpack(gradient, read<V>(dy + pixel * C + g * D + d));
      const i64 base = b * H * W * C + g * D + d;
      const Tokens<const S> map(x, base, C);
      const Tokens<T> to(dx, base, C);
      read_corners(corners, map, s, p);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (!p.inside(corner)) continue;
        T scattered[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[corner] += gradient[v] * corners[corner][v];
          scattered[v] = weight * p.share(corner) * gradient[v];
        }
        add(to.at(p.at(s, corner)), scattered);
      }
    }
    const T top = p.x0 * sums[0] + p.x1 * sums[1], bottom = p.x0 * sums[2] + p.x1 * sums[3];
    const T slope = T(s.scale) * weight;
    const T parts[4] = {
        slope * (p.y0 * (p.right * sums[1] - p.left * sums[0]) + p.y1 * (p.right * sums[3] - p.left * sums[2])),
        slope * (p.x0 * (p.bottom * sums[2] - p.top * sums[0]) + p.x1 * (p.bottom * sums[3] - p.top * sums[1])),
        p.y0 * top + p.y1 * bottom, T(0)};
    const T sum = warp_sums<4, kLanes / 2>(parts);
    if (!active || lane % (kLanes / 4)) continue;
    const int part = lane / (kLanes / 4);
    if (part < 2) doffset[(i * K * K + k) * 2 + part] = sum;
    if (part == 2) dweight[i * K * K + k] = sum;
  }
}
