// What avx512.h does, with 256-bit vectors (AVX2, FMA and F16C): sixteen rows are two of them.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

struct Floats {
  __m256 v[2];
};
struct Operand256 {
  __m256i v[2];
};

template <class F>
inline Floats each(F f) {
  return {{f(0), f(1)}};
}
inline Floats splat(float value) {
  return each([&](int) { return _mm256_set1_ps(value); });
}
inline Floats load(const float* p) {
  return each([&](int i) { return _mm256_loadu_ps(p + 8 * i); });
}
inline void store(float* p, Floats a) {
  for (int i = 0; i < 2; ++i) _mm256_storeu_ps(p + 8 * i, a.v[i]);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return each([&](int i) { return _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]); });
}
inline Floats subtract_product(Floats c, Floats a, Floats b) {
  return each([&](int i) { return _mm256_fnmadd_ps(a.v[i], b.v[i], c.v[i]); });
}
inline Floats subtract(Floats a, Floats b) {
  return each([&](int i) { return _mm256_sub_ps(a.v[i], b.v[i]); });
}
inline Floats product(Floats a, Floats b) {
  return each([&](int i) { return _mm256_mul_ps(a.v[i], b.v[i]); });
}
inline Floats add(Floats a, Floats b) {
  return each([&](int i) { return _mm256_add_ps(a.v[i], b.v[i]); });
}
inline __m128i words_at(const void* p, int half) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p) + half);
}
inline Floats load_half(const void* p) {
  return each([&](int i) { return _mm256_cvtph_ps(words_at(p, i)); });
}
inline Floats load_bfloat16(const void* p) {
  return each([&](int i) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words_at(p, i)), 16));
  });
}
inline void store_bfloat16(void* p, Floats a) {
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(a.v[i]);  // to nearest, ties to even
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i words = _mm256_srli_epi32(up, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p) + i, _mm256_castsi256_si128(packed));
  }
}
struct Chunk {
  __m256i v[2];
};
inline Chunk chunk_at(const uint8_t* p) {
  const auto from = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}
template <class F>
inline Operand256 each_float(F f) {
  return {{_mm256_castps_si256(f(0)), _mm256_castps_si256(f(1))}};
}

struct FloatSums {
  using Chunk = ::Chunk;
  using Element = float;
  using Sum = Floats;
  using Operand = Operand256;
  static Sum start(int32_t word) {
    return each([&](int) { return _mm256_castsi256_ps(_mm256_set1_epi32(word)); });
  }
  static Sum dot(Sum sum, Operand w, const int32_t* x) {
    const __m256 value = _mm256_castsi256_ps(_mm256_set1_epi32(*x));
    return each([&](int i) {
      return _mm256_fmadd_ps(_mm256_castsi256_ps(w.v[i]), value, sum.v[i]);
    });
  }
  static Floats floats(Sum sum) { return sum; }
};
inline Floats operand_floats(Operand256 w) {
  return each([&](int i) { return _mm256_castsi256_ps(w.v[i]); });
}

// The sixteen numbers lie in two tables of eight.
struct Nibbles : FloatSums {
  static constexpr int COLUMNS = 8, WORDS = 8;
  static constexpr float OFFSET = 0;
  __m256 low, high;
  explicit Nibbles(const float* codebook)
      : low(_mm256_loadu_ps(codebook)), high(_mm256_loadu_ps(codebook + 8)) {}
  static constexpr int column(int element) { return element; }
  Chunk read(const uint8_t* chunk) const { return chunk_at(chunk); }
  Operand operand(const Chunk& c, int d) const {
    return each_float([&](int i) {
      const __m256i index = _mm256_srli_epi32(c.v[i], 4 * d);
      const __m256 a = _mm256_permutevar8x32_ps(low, index);
      const __m256 b = _mm256_permutevar8x32_ps(high, index);
      return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    });
  }
};

// See avx512.h: a negative q is stored with its lower seven bits inverted.
struct Bytes : FloatSums {
  static constexpr int COLUMNS = 4, WORDS = 4;
  static constexpr float OFFSET = 0;
  explicit Bytes(const float*) {}
  static constexpr int column(int element) { return element; }
  Chunk read(const uint8_t* chunk) const {
    Chunk c = chunk_at(chunk);
    for (__m256i& v : c.v) {
      const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), v);
      v = _mm256_xor_si256(v, _mm256_and_si256(negative, _mm256_set1_epi8(127)));
    }
    return c;
  }
  Operand operand(const Chunk& c, int d) const {
    return each_float([&](int i) {
      const __m256i top = _mm256_slli_epi32(c.v[i], 24 - 8 * d);
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
    });
  }
};

// bfloat16 activations become floats.
template <class Decoder>
using FloatOp = Decoder;
template <class Decoder>
using Bfloat16Op = Decoder;

// Pairs of 16-bit words, since the product of bytes saturates in AVX2.
struct IntegerSums {
  using Chunk = ::Chunk;
  using Element = int16_t;
  using Sum = Operand256;
  using Operand = Operand256;
  Chunk read(const uint8_t* chunk) const { return chunk_at(chunk); }
  static Sum start(int32_t word) {
    return {{_mm256_set1_epi32(word), _mm256_set1_epi32(word)}};
  }
  static Sum dot(Sum sum, Operand w, const int32_t* x) {
    const __m256i value = _mm256_set1_epi32(*x);
    for (int i = 0; i < 2; ++i) {
      sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(w.v[i], value));
    }
    return sum;
  }
  static Floats floats(Sum sum) {
    return each([&](int i) { return _mm256_cvtepi32_ps(sum.v[i]); });
  }
};

struct NibblesDynamicOp : IntegerSums {
  static constexpr int COLUMNS = 8, WORDS = 4, OFFSET = 8;
  explicit NibblesDynamicOp(const float*) {}
  static constexpr int column(int element) { return element / 2 + element % 2 * 4; }
  Operand operand(const Chunk& c, int d) const {
    Operand w;
    for (int i = 0; i < 2; ++i) {
      w.v[i] = _mm256_and_si256(_mm256_srli_epi16(c.v[i], 4 * d), _mm256_set1_epi16(15));
    }
    return w;
  }
};

struct BytesDynamicOp : IntegerSums {
  static constexpr int COLUMNS = 4, WORDS = 2, OFFSET = 128;
  explicit BytesDynamicOp(const float*) {}
  static constexpr int column(int element) { return element / 2 + element % 2 * 2; }
  Operand operand(const Chunk& c, int d) const {
    Operand w;
    for (int i = 0; i < 2; ++i) {
      w.v[i] = d ? _mm256_srli_epi16(c.v[i], 8) : _mm256_and_si256(c.v[i], _mm256_set1_epi16(255));
    }
    return w;
  }
};

constexpr int tiles_at_once(int) { return 1; }
constexpr int MAX_SUMS = 4;  // of rows times tiles
using RowCounts = std::integer_sequence<int, 1, 2, 4>;
