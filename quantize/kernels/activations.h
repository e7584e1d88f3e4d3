// What rows.cpp and gemm.cpp share: the scales of sixteen rows, activations laid out for an Op, and
// the way of sixteen sums into the result.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels.h"

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "avx2.h"
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((optimize("O3")))
#else
#define VECTORIZED
#endif

namespace packed {

inline constexpr float INTEGERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
inline constexpr float MXFP4[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};

inline Floats factors(const Weight& w, const char* from, int64_t tile, int64_t group) {
  const char* p = from + w.factor(tile, group) * TILE * w.scale_bytes();
  if (w.scale_type == Number::bfloat16) return load_bfloat16(p);
  if (w.scale_type == Number::float16) return load_half(p);
  return load(reinterpret_cast<const float*>(p));
}

// ---- activations ----

inline VECTORIZED void to_floats(Number type, const void* from, int64_t count, float* to) {
  if (type == Number::float32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  const auto words = static_cast<const uint16_t*>(from);
  uint32_t* bits = reinterpret_cast<uint32_t*>(to);
  for (int64_t k = 0; k < count; ++k) bits[k] = static_cast<uint32_t>(words[k]) << 16;
}

// Magnitudes are compared as the integers that their bits are: NaN is above all, and stays.
inline VECTORIZED float largest(const float* row, int64_t count) {
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(row);
  uint32_t lanes[16] = {};
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    for (int i = 0; i < 16; ++i) lanes[i] = std::max(lanes[i], bits[k + i] & 0x7FFFFFFF);
  }
  for (; k < count; ++k) lanes[0] = std::max(lanes[0], bits[k] & 0x7FFFFFFF);
  const uint32_t most = *std::max_element(lanes, lanes + 16);
  float size;
  std::memcpy(&size, &most, sizeof(size));
  return size;
}

template <class Integer>
VECTORIZED void to_integers(const float* row, int64_t count, float scale, Integer* to) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: adding it rounds to nearest, ties to even
  for (int64_t k = 0; k < count; ++k) {
    to[k] = static_cast<Integer>(static_cast<int32_t>(row[k] / scale + ROUND - ROUND));
  }
}

// Of a multiple of four.
inline VECTORIZED float total(const float* row, int64_t count) {
  float lanes[16] = {}, sum = 0;
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    for (int i = 0; i < 16; ++i) lanes[i] += row[k + i];
  }
  for (; k < count; ++k) lanes[k % 16] += row[k];
  for (float lane : lanes) sum += lane;
  return sum;
}

template <class Integer>
VECTORIZED int32_t total(const Integer* row, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += row[k];
  return sum;
}

// Activations laid out for an Op: words [chunks, rows, WORDS], and for every group and row what its
// sum starts from and the sum of its activations.
template <class Op>
struct Activations {
  using Element = typename Op::Element;
  static constexpr bool INTEGER = std::is_integral_v<Element> && std::is_signed_v<Element>;
  static constexpr int BYTES = Op::COLUMNS * sizeof(Element);
  static_assert(BYTES == 4 * Op::WORDS);
  std::vector<int32_t> words, starts;
  std::vector<float> sums, token_scales;
  int64_t num_rows = 0;

  // Of `given` rows, which set_row sets, and beyond them zeros up to `rows`.
  void begin(const Weight& w, int64_t given, int64_t rows) {
    num_rows = rows;
    words.resize(w.num_chunks * rows * Op::WORDS);
    starts.resize(w.num_groups * rows);
    sums.resize(w.num_groups * rows);
    token_scales.assign(rows, 1.0f);
    if (given < rows) {
      std::fill(words.begin(), words.end(), 0);
      std::fill(starts.begin(), starts.end(), 0);
      std::fill(sums.begin(), sums.end(), 0.0f);
    }
  }

  // x [K]. Without `with_sums` starts and sums stay what they were.
  void set_row(const Weight& w, Number type, const void* x, int64_t m, bool with_sums = true) {
    const int64_t width = w.num_chunks * Op::COLUMNS;
    constexpr bool IS_BFLOAT16 = sizeof(Element) == 2 && !INTEGER;
    thread_local std::vector<float> row;
    thread_local std::vector<Element> elements;
    row.resize(std::max<size_t>(row.size(), width));
    elements.resize(std::max<size_t>(elements.size(), width));
    std::fill(row.begin() + w.num_columns, row.begin() + width, 0.0f);
    std::fill(elements.begin() + w.num_columns, elements.begin() + width, 0);
    with_sums = with_sums && (w.zeros || Op::OFFSET != 0);
    if (!IS_BFLOAT16 || with_sums) to_floats(type, x, w.num_columns, row.data());
    if constexpr (INTEGER) {
      const float scale = std::max(largest(row.data(), w.num_columns), 1e-30f) / 127;
      token_scales[m] = scale;
      to_integers(row.data(), w.num_columns, scale, elements.data());
      lay_out(elements.data(), w.num_chunks, m);
      if (with_sums) add_up(w, elements.data(), m);
      return;
    }
    if constexpr (IS_BFLOAT16) {
      const bool is_padded = width != w.num_columns;
      if (is_padded) std::memcpy(elements.data(), x, w.num_columns * sizeof(Element));
      lay_out(is_padded ? elements.data() : x, w.num_chunks, m);
    } else {
      lay_out(row.data(), w.num_chunks, m);
    }
    if (with_sums) add_up(w, row.data(), m);
  }

  void lay_out(const void* row, int64_t num_chunks, int64_t m) {
    char* to = reinterpret_cast<char*>(words.data()) + m * BYTES;
    const char* from = static_cast<const char*>(row);
    const int64_t stride = num_rows * BYTES;
    if constexpr (BYTES == 32) {
      alignas(32) int32_t index[8];
      for (int i = 0; i < 8; ++i) index[i] = Op::column(i);
      const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
      for (int64_t c = 0; c < num_chunks; ++c, from += BYTES, to += stride) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(v, order));
      }
    } else {
      constexpr int SIZE = sizeof(Element);
      alignas(16) uint8_t index[16] = {};
      for (int i = 0; i < BYTES; ++i) index[i] = Op::column(i / SIZE) * SIZE + i % SIZE;
      const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(index));
      for (int64_t c = 0; c < num_chunks; ++c, from += BYTES, to += stride) {
        __m128i v{};
        std::memcpy(&v, from, BYTES);
        v = _mm_shuffle_epi8(v, order);
        std::memcpy(to, &v, BYTES);
      }
    }
  }

  template <class Value>
  void add_up(const Weight& w, const Value* row, int64_t m) {
    const int64_t width = w.num_chunks * Op::COLUMNS;
    for (int64_t g = 0; g < w.num_groups; ++g) {
      const int64_t start = g * w.group_size;
      const auto sum = total(row + start, std::min(w.group_size, width - start));
      sums[g * num_rows + m] = static_cast<float>(sum);
      const auto first = -static_cast<decltype(sum)>(Op::OFFSET) * sum;
      std::memcpy(&starts[g * num_rows + m], &first, 4);
    }
  }
};

// ---- results ----

inline void store_as(Number type, char* p, Floats value) {
  if (type == Number::float32) store(reinterpret_cast<float*>(p), value);
  else store_bfloat16(p, value);
}

// A tile's part of a row of the result: times the token's scale, plus the bias, in its type.
inline void put(const Weight& w, Number type, const float* sums, float token_scale,
                const float* bias, int64_t tile, char* y, int64_t row) {
  const int64_t start = tile * TILE, count = std::min(TILE, w.num_rows - start);
  const int64_t size = type == Number::float32 ? 4 : 2;
  char* to = y + (row * w.num_rows + start) * size;
  alignas(64) float part[TILE] = {};
  Floats value = product(load(sums), splat(token_scale));
  if (count == TILE) {
    store_as(type, to, bias ? add(value, load(bias + start)) : value);
    return;
  }
  if (bias) std::memcpy(part, bias + start, count * sizeof(float));
  store_as(type, reinterpret_cast<char*>(part), add(value, load(part)));
  std::memcpy(to, part, count * size);
}

}  // namespace packed
