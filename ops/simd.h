// Vectors of one cache line and the elementary functions that the CPU kernels need, in GCC/Clang vector extensions:
// the compiler lowers them to AVX-512, AVX2, NEON or SSE, whatever the machine has.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#define LINZOO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LINZOO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, linzoo::vint{__VA_ARGS__})
#endif

namespace linzoo {

template <class T>
struct Simd {
  static constexpr int width = 64 / sizeof(T);
  typedef T vec __attribute__((vector_size(64)));
};

typedef Simd<float>::vec vfloat;
typedef Simd<double>::vec vdouble;
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef uint16_t vshort __attribute__((vector_size(32)));

template <class T>
inline typename Simd<T>::vec broadcast(T x) {
  return x - typename Simd<T>::vec{};
}

// A sum of many terms that keeps the digits of small ones (Kahan).
template <class V>
struct Sum {
  V sum = {}, lost = {};
  void add(V x) {
    const V y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
  }
};

// Sixteen numbers of 16 bits to float32 and back, rounded to the nearest, ties to even.
inline vfloat widen(const c10::BFloat16* p) {
  vshort bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vfloat)(__builtin_convertvector(bits, vuint) << 16);
}

inline void narrow(c10::BFloat16* p, vfloat v) {
  const vuint bits = (vuint)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = vuint{} + 0x7fc0;
  const vshort out = __builtin_convertvector(v == v ? rounded : nan, vshort);
  std::memcpy(p, &out, sizeof out);
}

inline vfloat widen(const c10::Half* p) {
#ifdef __AVX512F__
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < 16; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline void narrow(c10::Half* p, vfloat v) {
#ifdef __AVX512F__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

// n <= width leading lanes; the others read as 0.
template <class T, class S>
inline typename Simd<T>::vec load(const S* p, int n) {
  constexpr int width = Simd<T>::width;
  if constexpr (std::is_same_v<S, T>) {
    typename Simd<T>::vec v = {};
    if (n == width) {
      std::memcpy(&v, p, sizeof v);
    } else {
      for (int i = 0; i < n; ++i) v[i] = p[i];
    }
    return v;
  } else {
    if (n == width) return widen(p);
    S lanes[width] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return widen(lanes);
  }
}

template <class T, class S>
inline void store(S* p, typename Simd<T>::vec v, int n) {
  constexpr int width = Simd<T>::width;
  if constexpr (std::is_same_v<S, T>) {
    if (n == width) {
      std::memcpy(p, &v, sizeof v);
    } else {
      for (int i = 0; i < n; ++i) p[i] = v[i];
    }
  } else {
    if (n == width) return narrow(p, v);
    S lanes[width];
    narrow(lanes, v);
    std::copy_n(lanes, n, p);
  }
}

// Whether a comparison holds in every lane.
template <class I>
inline bool all(I mask) {
  int64_t words[8], together = -1;
  std::memcpy(words, &mask, sizeof words);
  for (const int64_t word : words) together &= word;
  return together == -1;
}

// f(d, lanes) for the channels begin to end, a vector at a time; `lanes` is a constant wherever a vector is full.
template <class T, class F>
void by_channels(int64_t begin, int64_t end, F f) {
  constexpr int width = Simd<T>::width;
  for (; begin + width <= end; begin += width) f(begin, std::integral_constant<int, width>{});
  if (begin < end) f(begin, static_cast<int>(end - begin));
}

// out[i] = sum over the lanes of rows[i], for `count` rows (a multiple of a vector's width).
template <class T>
inline void sum_lanes(const typename Simd<T>::vec* rows, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    T sum = rows[i][0];
    for (int lane = 1; lane < Simd<T>::width; ++lane) sum += rows[i][lane];
    out[i] = sum;
  }
}

// Sixteen rows at once: four rounds, each of which adds pairs of vectors whose halves are partial sums of two rows.
template <>
inline void sum_lanes<float>(const vfloat* rows, int64_t count, float* out) {
  auto fold8 = [](vfloat a, vfloat b) {
    return LINZOO_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           LINZOO_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  auto fold4 = [](vfloat a, vfloat b) {
    return LINZOO_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           LINZOO_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  };
  auto fold2 = [](vfloat a, vfloat b) {
    return LINZOO_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           LINZOO_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  auto fold1 = [](vfloat a, vfloat b) {
    return LINZOO_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           LINZOO_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  };
  for (int64_t i = 0; i < count; i += 16) {
    vfloat a[8], b[4];
    for (int j = 0; j < 8; ++j) a[j] = fold8(rows[i + j], rows[i + j + 8]);
    for (int j = 0; j < 4; ++j) b[j] = fold4(a[j], a[j + 4]);
    const vfloat sums = fold1(fold2(b[0], b[2]), fold2(b[1], b[3]));
    std::memcpy(out + i, &sums, sizeof sums);
  }
}

// 2^x for x <= 128. x = n + f with |f| <= 1/2; 2^f by a minimax polynomial (relative error 2e-9 before rounding), 2^n
// by the exponent bits. Below -126 the result stays at the smallest normal number; NaN stays NaN.
inline vfloat exp2(vfloat x) {
#ifdef __AVX512F__
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vfloat f = x - n;
#else
  x = x < -126.f ? broadcast(-126.f) : x;
  x = x > 127.9999f ? broadcast(127.9999f) : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const vfloat shifted = x + magic;
  const vfloat f = x - (shifted - magic);
#endif
  vfloat p = 0.0001534581162f * f + 0.001339993122f;
  p = p * f + 0.009618488959f;
  p = p * f + 0.05550328777f;
  p = p * f + 0.2402264689f;
  p = p * f + 0.6931472057f;
  p = p * f + 1.f;
#ifdef __AVX512F__
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (vfloat)((vint)p + ((vint)shifted << 23));
#endif
}

inline vdouble exp2(vdouble x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// log(1 + z) for 0 <= z <= 1, accurate relative to its value, given s = z / (2 + z): 2 atanh(s), odd in s (error 4e-9).
inline vfloat log1p_unit(vfloat, vfloat s) {
  const vfloat q = s * s;
  vfloat p = 0.140891672f * q + 0.1398030143f;
  p = p * q + 0.2001245514f;
  p = p * q + 0.3333315734f;
  p = p * q + 1.f;
  return (s + s) * p;
}

inline vdouble log1p_unit(vdouble z, vdouble) {
  for (int i = 0; i < Simd<double>::width; ++i) z[i] = std::log1p(z[i]);
  return z;
}

// log(1 + e^x) from z = e^-|x|.
template <class T, class V = typename Simd<T>::vec>
inline V softplus(V x) {
  const V zero = {};
  const V z = exp2((x < zero ? x : -x) * T(1.4426950408889634));
  return (x < zero ? zero : x) + log1p_unit(z, z / (z + T(2)));
}

// The same, and its derivative sigmoid(x), with one division for both.
template <class T, class V = typename Simd<T>::vec>
inline V softplus(V x, V& slope) {
  const V zero = {};
  const V z = exp2((x < zero ? x : -x) * T(1.4426950408889634));
  const V one_z = z + T(1), two_z = z + T(2), inverse = T(1) / (one_z * two_z);
  slope = two_z * inverse * (x < zero ? z : broadcast<T>(1));
  return (x < zero ? zero : x) + log1p_unit(z, z * one_z * inverse);
}

}  // namespace linzoo
