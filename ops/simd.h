// Vectors of one cache line and the elementary functions that the CPU kernels need, in GCC/Clang vector extensions:
// the compiler lowers them to AVX-512, AVX2, NEON or SSE, whatever the machine has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace linzoo {

template <class T>
struct Simd {
  static constexpr int width = 64 / sizeof(T);
  typedef T vec __attribute__((vector_size(64)));
};

typedef Simd<float>::vec vfloat;
typedef Simd<double>::vec vdouble;
typedef int32_t vint __attribute__((vector_size(64)));

template <class T>
inline typename Simd<T>::vec broadcast(T x) {
  return x - typename Simd<T>::vec{};
}

// n <= width leading lanes; the others read as 0.
template <class T, class S>
inline typename Simd<T>::vec load(const S* p, int n) {
  typename Simd<T>::vec v;
  T lanes[Simd<T>::width] = {};
  if (n == Simd<T>::width) {
    for (int i = 0; i < Simd<T>::width; ++i) lanes[i] = static_cast<T>(p[i]);
  } else {
    for (int i = 0; i < n; ++i) lanes[i] = static_cast<T>(p[i]);
  }
  std::memcpy(&v, lanes, sizeof v);
  return v;
}

template <class T, class S>
inline void store(S* p, typename Simd<T>::vec v, int n) {
  T lanes[Simd<T>::width];
  std::memcpy(lanes, &v, sizeof v);
  if (n == Simd<T>::width) {
    for (int i = 0; i < Simd<T>::width; ++i) p[i] = static_cast<S>(lanes[i]);
  } else {
    for (int i = 0; i < n; ++i) p[i] = static_cast<S>(lanes[i]);
  }
}

template <class V>
inline auto horizontal_sum(V v) {
  constexpr int width = sizeof(V) / sizeof(v[0]);
  auto sum = v[0];
  for (int i = 1; i < width; ++i) sum += v[i];
  return sum;
}

inline float horizontal_sum(vfloat v) {  // a tree, not a chain
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 lo, hi;
  std::memcpy(&lo, &v, 32);
  std::memcpy(&hi, reinterpret_cast<const char*>(&v) + 32, 32);
  lo += hi;
  v4 a, b;
  std::memcpy(&a, &lo, 16);
  std::memcpy(&b, reinterpret_cast<const char*>(&lo) + 16, 16);
  a += b;
  return (a[0] + a[2]) + (a[1] + a[3]);
}

// 2^x for x <= 128. x = n + f with |f| <= 1/2; 2^f by a minimax polynomial (relative error 2e-9 before rounding), 2^n by
// the exponent bits. Below -126 the result stays at the smallest normal number; NaN stays NaN.
inline vfloat exp2(vfloat x) {
  x = x < -126.f ? broadcast(-126.f) : x;
  x = x > 127.9999f ? broadcast(127.9999f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const vfloat shifted = x + magic;
  const vfloat f = x - (shifted - magic);
  vfloat p = 0.0001534581162f * f + 0.001339993122f;
  p = p * f + 0.009618488959f;
  p = p * f + 0.05550328777f;
  p = p * f + 0.2402264689f;
  p = p * f + 0.6931472057f;
  p = p * f + 1.f;
  return (vfloat)((vint)p + ((vint)shifted << 23));
}

inline vdouble exp2(vdouble x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// log(1 + z) for 0 <= z <= 1, accurate relative to its value: 2 atanh(s) with s = z / (2 + z), odd in s (error 4e-9).
inline vfloat log1p_unit(vfloat z) {
  const vfloat s = z / (z + 2.f), q = s * s;
  vfloat p = 0.140891672f * q + 0.1398030143f;
  p = p * q + 0.2001245514f;
  p = p * q + 0.3333315734f;
  p = p * q + 1.f;
  return 2.f * s * p;
}

inline vdouble log1p_unit(vdouble z) {
  for (int i = 0; i < Simd<double>::width; ++i) z[i] = std::log1p(z[i]);
  return z;
}

// log(1 + e^x) and, if asked, its derivative sigmoid(x), both from z = e^-|x|.
template <class V>
inline V softplus(V x, V* slope) {
  typedef decltype(x[0] + x[0]) T;
  const V zero = {};
  const V z = exp2((x < zero ? x : -x) * static_cast<T>(1.4426950408889634));
  if (slope) {
    const V r = static_cast<T>(1) / (z + static_cast<T>(1));
    *slope = x < zero ? z * r : r;
  }
  return (x < zero ? zero : x) + log1p_unit(z);
}

}  // namespace linzoo
