// Sixteen floats at a time, in the compiler's own vectors: one instruction where the processor is
// as wide, two where it is half as wide.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace step {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
constexpr int64_t LANES = 16;

inline Floats splat(float value) { return Floats{} + value; }
template <class Vector>
inline Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class Vector>
inline void store(void* p, Vector v) {
  std::memcpy(p, &v, sizeof(v));
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
// Over all lanes: of the halves, of their halves, and so on.
template <class Op>
inline float folded(Floats v, Op op) {
  v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}
inline float sum_of(Floats v) {
  return folded(v, [](Floats a, Floats b) { return a + b; });
}
inline float largest_of(Floats v) {
  return folded(v, [](Floats a, Floats b) { return larger(a, b); });
}

inline Floats widened(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }
inline Words bfloat16_bits(Floats v) {  // to nearest, ties to even
  const Words bits = (Words)v;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
inline Floats rounded(packed::Number type, Floats v) {
  return type == packed::Number::float32 ? v : (Floats)(bfloat16_bits(v) << 16);
}

// Rows of numbers in a model's type, from and to floats.
inline Floats load_as(packed::Number type, const void* p, int64_t at) {
  if (type == packed::Number::float32) return load<Floats>(static_cast<const float*>(p) + at);
  return widened(load<Halves>(static_cast<const uint16_t*>(p) + at));
}
inline void store_as(packed::Number type, void* p, int64_t at, Floats v) {
  if (type == packed::Number::float32) store(static_cast<float*>(p) + at, v);
  else store(static_cast<uint16_t*>(p) + at, __builtin_convertvector(bfloat16_bits(v), Halves));
}
inline int64_t size_of(packed::Number type) { return type == packed::Number::float32 ? 4 : 2; }

// Calls body(at, count) for stretches of at most sixteen of 0..count-1.
template <class Body>
inline void by_lanes(int64_t count, const Body& body) {
  for (int64_t at = 0; at < count; at += LANES) body(at, count - at < LANES ? count - at : LANES);
}
inline Floats load_some(packed::Number type, const void* p, int64_t at, int64_t count) {
  if (count == LANES) return load_as(type, p, at);
  alignas(64) char part[64] = {};
  const int64_t size = size_of(type);
  std::memcpy(part, static_cast<const char*>(p) + at * size, count * size);
  return load_as(type, part, 0);
}
inline void store_some(packed::Number type, void* p, int64_t at, int64_t count, Floats v) {
  if (count == LANES) return store_as(type, p, at, v);
  alignas(64) char part[64];
  const int64_t size = size_of(type);
  store_as(type, part, 0, v);
  std::memcpy(static_cast<char*>(p) + at * size, part, count * size);
}

// The nearest e4m3 (2209.05433), ties to even, of a number of at most 448.
inline uint8_t float8_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint8_t sign = bits >> 24 & 0x80;
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7F;
  float size;
  std::memcpy(&size, &bits, 4);
  if (size < 0x1p-6f) {  // steps of 2^-9
    return sign | static_cast<uint8_t>(size * 512 + 12582912 - 12582912);
  }
  bits += 0x7FFFF + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((bits >> 20) - (120 << 3));
}

// e^r of a small r by its Taylor polynomial.
inline Floats small_exponential(Floats r) {
  Floats p = splat(1.f / 5040) * r + 1.f / 720;
  p = ((p * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6;
  return ((p * r + 0.5f) * r + 1.f) * r + 1.f;
}
// e^x around the nearest multiple of ln 2; exactly 0 below -87, as for -infinity. NaN stays.
inline Floats exponential(Floats x) {
  const auto rest = [&](Floats n) { return (x - n * 0.693359375f) + n * 2.12194440e-4f; };
#ifdef __AVX512F__
  x = (Floats)_mm512_min_ps(_mm512_set1_ps(128), (__m512)x);  // of NaN and a number the second
  const __m512 n = _mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87), _CMP_NLT_UQ);
  const auto e = (__m512)small_exponential(rest((Floats)n));
  return (Floats)_mm512_maskz_scalef_ps(kept, e, n);
#else
  const Floats given = x;
  x = larger(x < splat(88.f) ? x : splat(88.f), splat(-87.f));
  constexpr float ROUND = 12582912;  // 1.5 * 2^23
  const Floats n = x * 1.44269504f + ROUND - ROUND;
  const Ints power = __builtin_convertvector(n, Ints) << 23;
  const Floats e = (Floats)((Ints)small_exponential(rest(n)) + power);
  const Floats kept = given == given ? e : given;
  return given < splat(-87.f) ? Floats{} : kept;
#endif
}
inline Floats hyperbolic_tangent(Floats x) {
  return 1.f - 2.f / (exponential(2.f * x) + 1.f);
}

}  // namespace step
