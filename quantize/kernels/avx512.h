// Sixteen rows of a weight at a time, one in each 32-bit lane (AVX-512 with VBMI, VNNI and BF16).
//
// A chunk is 64 bytes: four bytes of each of sixteen rows, which are four 8-bit or eight 4-bit
// numbers. An Op turns a chunk into WORDS operands of 32 bits a lane and multiplies each with one
// 32-bit word of the activations, broadcast. ORDER says which of the chunk's columns an element of
// these words belongs to.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

using Floats = __m512;  // of sixteen rows

inline Floats splat(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats load_half(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline Floats load_bfloat16(const void* p) {
  const auto words = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline void store_bfloat16(void* p, Floats v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}

// Eight 4-bit numbers a lane to four pairs of bfloat16 by a table of sixteen.
struct Nibbles {
  static constexpr int COLUMNS = 8, PAIRS = 4;
  static constexpr float OFFSET = 0;  // of the decoded numbers from the true ones
  __m512i table;
  explicit Nibbles(const float* codebook) {
    uint16_t words[32];
    for (int i = 0; i < 32; ++i) {  // twice over: the permutation looks at five bits
      uint32_t bits;
      std::memcpy(&bits, codebook + i % 16, 4);
      words[i] = bits >> 16;
    }
    table = _mm512_loadu_si512(words);
  }
  using Chunk = __m512i;
  Chunk read(const uint8_t* chunk) const { return _mm512_loadu_si512(chunk); }
  __m512i pair(const Chunk& v, int d) const {
    return _mm512_permutexvar_epi16(d ? _mm512_srli_epi16(v, 4 * d) : v, table);
  }
};

// Four 8-bit numbers a lane to two pairs of bfloat16. A negative q is stored with its lower seven
// bits inverted, so q + 0.5 is plus or minus (the seven bits + 0.5), which bfloat16 holds exactly
// and a table of 128 gives in two lookups: 7 instructions for 64 numbers, where converting through
// integers and floats takes 11.
struct Bytes {
  static constexpr int COLUMNS = 4, PAIRS = 2;
  static constexpr float OFFSET = 0.5f;
  __m512i low[2], high[2];
  explicit Bytes(const float*) {
    uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) {
      const float value = i + 0.5f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bytes[0][i] = bits >> 16;
      bytes[1][i] = bits >> 24;
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_loadu_si512(bytes[0] + 64 * i);
      high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
    }
  }
  struct Chunk {
    __m512i low, high;
  };
  Chunk read(const uint8_t* chunk) const {
    const __m512i v = _mm512_loadu_si512(chunk);
    const __m512i h = _mm512_permutex2var_epi8(high[0], v, high[1]);
    return {_mm512_permutex2var_epi8(low[0], v, low[1]),
            _mm512_ternarylogic_epi32(h, v, _mm512_set1_epi8(-128), 0xF8)};  // h | (v & 0x80)
  }
  __m512i pair(const Chunk& v, int d) const {
    constexpr uint64_t ODD = 0xAAAAAAAAAAAAAAAA;
    return d ? _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16(v.low, 8), v.high)
             : _mm512_mask_blend_epi8(ODD, v.low, _mm512_slli_epi16(v.high, 8));
  }
};

// bfloat16 activations: word d holds columns d and d + COLUMNS / 2.
template <class Decoder>
struct Bfloat16Op : Decoder {
  using Decoder::Decoder;
  using Element = uint16_t;
  using Sum = __m512;
  using Operand = __m512i;
  static constexpr int WORDS = Decoder::PAIRS;
  static constexpr int column(int element) {
    return element / 2 + element % 2 * (Decoder::COLUMNS / 2);
  }
  Operand operand(const typename Decoder::Chunk& v, int d) const { return Decoder::pair(v, d); }
  static Sum start(int32_t word) { return _mm512_castsi512_ps(_mm512_set1_epi32(word)); }
  static Sum dot(Sum sum, Operand w, const int32_t* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*x));
  }
  static Floats floats(Sum sum) { return sum; }
};

// float32 activations, in the order of the pairs.
template <class Decoder>
struct FloatOp : Decoder {
  using Decoder::Decoder;
  using Element = float;
  using Sum = __m512;
  using Operand = __m512i;
  static constexpr int WORDS = 2 * Decoder::PAIRS;
  static constexpr int column(int element) { return Bfloat16Op<Decoder>::column(element); }
  Operand operand(const typename Decoder::Chunk& v, int d) const {
    const __m512i pair = Decoder::pair(v, d / 2);
    return d % 2 ? _mm512_and_si512(pair, _mm512_set1_epi32(0xFFFF0000))
                 : _mm512_slli_epi32(pair, 16);
  }
  static Sum start(int32_t word) { return _mm512_castsi512_ps(_mm512_set1_epi32(word)); }
  static Sum dot(Sum sum, Operand w, const int32_t* x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(_mm512_set1_epi32(*x)), sum);
  }
  static Floats floats(Sum sum) { return sum; }
};

// 8-bit activations times unsigned numbers (q + OFFSET), summed exactly.
struct IntegerSums {
  using Chunk = __m512i;
  using Element = int8_t;
  using Sum = __v16si;  // the type of the builtin: GCC keeps arrays of others in memory
  using Operand = __m512i;
  Chunk read(const uint8_t* chunk) const { return _mm512_loadu_si512(chunk); }
  static Sum start(int32_t word) { return (Sum)_mm512_set1_epi32(word); }
  static Sum dot(Sum sum, Operand w, const int32_t* x) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, w, _mm512_set1_epi32(*x));
  }
  static Floats floats(Sum sum) { return _mm512_cvtepi32_ps((__m512i)sum); }
};

struct NibblesDynamicOp : IntegerSums {
  static constexpr int COLUMNS = 8, WORDS = 2, OFFSET = 8;
  explicit NibblesDynamicOp(const float*) {}
  static constexpr int column(int element) { return element % 4 * 2 + element / 4; }
  Operand operand(const Chunk& v, int d) const {
    return _mm512_and_si512(d ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
  }
};

struct BytesDynamicOp : IntegerSums {
  static constexpr int COLUMNS = 4, WORDS = 1, OFFSET = 128;
  explicit BytesDynamicOp(const float*) {}
  static constexpr int column(int element) { return element; }
  Operand operand(const Chunk& v, int) const { return v; }
};

inline Floats operand_floats(__m512i w) { return _mm512_castsi512_ps(w); }

// Tiles of sixteen rows that are walked together for so many rows of activations: enough sums to
// hide the latency of one, and no more than the registers hold.
constexpr int tiles_at_once(int num_rows) {
  return num_rows <= 4 ? 4 : num_rows <= 8 ? 2 : 1;
}
constexpr int MAX_SUMS = 16;  // of rows times tiles
using RowCounts = std::integer_sequence<int, 1, 2, 3, 4, 6, 8, 12, 16>;
