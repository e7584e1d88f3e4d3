// Products of a few rows of activations with a 16- or 32-bit weight: as it is stored, or as oneDNN
// lays it out for its own products of many rows.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace packed {
namespace {

constexpr int64_t AHEAD = 2048;  // bytes of each stream that are fetched before they are needed

inline Floats load_as(const float* p) { return load(p); }
inline Floats load_as(const uint16_t* p) { return load_bfloat16(p); }
inline float widened(float value) { return value; }
inline float widened(uint16_t word) {
  const uint32_t bits = static_cast<uint32_t>(word) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  *to = is_nan ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float total(Floats sums) {
  alignas(64) float lanes[16];
  store(lanes, sums);
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Rows of the weight lie one after the other: sixteen columns a lane, added up at the end.
template <class Element>
class PlainProduct : public Product {
 public:
  PlainProduct(const void* weight, int64_t rows, int64_t columns, const float* added)
      : w(static_cast<const Element*>(weight)), bias(added) {
    num_rows = rows;
    num_columns = columns;
    num_units = (rows + UNIT_ROWS - 1) / UNIT_ROWS;
    unit_bytes = UNIT_ROWS * columns * sizeof(Element);
    start = static_cast<const uint8_t*>(weight);
    width = (columns + 15) / 16 * 16;
  }

  void begin(int64_t count) override {
    given = count;
    x.resize(MAX_ROWS * width);
  }

  void set_row(int64_t row, const void* from) override {
    float* to = x.data() + row * width;
    const auto elements = static_cast<const Element*>(from);
    for (int64_t k = 0; k < num_columns; ++k) to[k] = widened(elements[k]);
    std::fill(to + num_columns, to + width, 0.0f);
  }

  void run(int64_t first, int64_t last, void* y) const override {
    const int64_t stop = std::min(last * UNIT_ROWS, num_rows);
    for (int64_t n = first * UNIT_ROWS; n < stop; n += TOGETHER) {
      if (n + TOGETHER <= stop) {
        multiply<TOGETHER>(n, static_cast<Element*>(y));
      } else {
        for (int64_t i = n; i < stop; ++i) multiply<1>(i, static_cast<Element*>(y));
      }
    }
  }

 private:
  static constexpr int64_t UNIT_ROWS = 16;
  static constexpr int TOGETHER = 4;  // rows of the weight

  template <int R>
  void multiply(int64_t n, Element* y) const {
    int64_t m = 0;
    for (; m + 4 <= given; m += 4) multiply<R, 4>(n, m, y);
    for (; m < given; ++m) multiply<R, 1>(n, m, y);
  }

  template <int R, int M>
  void multiply(int64_t n, int64_t m, Element* y) const {
    Floats sums[R][M];
    for (auto& of_row : sums) {
      for (Floats& sum : of_row) sum = splat(0);
    }
    const Element* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = w + (n + r) * num_columns;
    const float* from = x.data() + m * width;
    const int64_t whole = num_columns / 16 * 16;
    const auto step = [&](int64_t k, auto&& at) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Floats weights = at(r, k);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
          sums[r][i] = multiply_add(weights, load(from + i * width + k), sums[r][i]);
        }
      }
    };
    constexpr int64_t EARLY = AHEAD / sizeof(Element);
    for (int64_t k = 0; k < whole; k += 16) {
      // What follows the end of these rows is the beginning of the next ones.
      const int64_t at = k + EARLY + (k + EARLY < num_columns ? 0 : (R - 1) * num_columns);
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(rows[r] + at), _MM_HINT_T0);
      }
      step(k, [&](int r, int64_t at) { return load_as(rows[r] + at); });
    }
    if (whole < num_columns) {
      step(whole, [&](int r, int64_t at) {
        alignas(64) Element tail[16] = {};
        std::memcpy(tail, rows[r] + at, (num_columns - at) * sizeof(Element));
        return load_as(tail);
      });
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < M; ++i) {
        const float added = bias ? bias[n + r] : 0;
        put(y + (m + i) * num_rows + n + r, total(sums[r][i]) + added);
      }
    }
  }

  const Element* const w;
  const float* const bias;
  int64_t width, given = 0;
  std::vector<float> x;
};

#ifdef __AVX512BF16__
// 64 rows by a pair of columns are 256 bytes. Sums of a few rows of activations stay in registers
// for a stretch of columns that the cache holds, and so the weight is read from memory once.
class BlockedProduct : public Product {
 public:
  BlockedProduct(const void* weight, int64_t rows, int64_t columns, const float* added)
      : w(static_cast<const uint32_t*>(weight)), bias(added) {
    num_rows = rows;
    num_columns = columns;
    num_units = (rows + BLOCK - 1) / BLOCK;
    pairs = (columns + 31) / 32 * 16;
    unit_bytes = pairs * BLOCK * 4;
    start = static_cast<const uint8_t*>(weight);
  }

  void begin(int64_t count) override {
    given = count;
    x.resize(MAX_ROWS * pairs);
  }

  void set_row(int64_t row, const void* from) override {
    uint32_t* to = x.data() + row * pairs;
    if (num_columns % 2) to[num_columns / 2] = 0;
    std::memcpy(to, from, num_columns * 2);
    std::fill(to + (num_columns + 1) / 2, to + pairs, 0);
  }

  void run(int64_t first, int64_t last, void* y) const override {
    alignas(64) float sums[MAX_ROWS * BLOCK];
    for (int64_t block = first; block < last; ++block) {
      std::fill(sums, sums + given * BLOCK, 0.0f);
      const uint32_t* from = w + block * pairs * BLOCK;
      const int64_t stretch = given <= TOGETHER ? pairs : STRETCH;
      for (int64_t begin = 0; begin < pairs; begin += stretch) {
        const int64_t end = std::min(begin + stretch, pairs);
        for (int64_t m = 0; m < given; m += TOGETHER) {
          const int64_t count = std::min<int64_t>(given - m, TOGETHER);
          RUN[count - 1](from, x.data() + m * pairs, pairs, begin, end, sums + m * BLOCK);
        }
      }
      write(block * BLOCK, sums, static_cast<uint16_t*>(y));
    }
  }

 private:
  static constexpr int64_t BLOCK = 64, TOGETHER = 6, STRETCH = 128;

  template <int M>
  static void multiply(const uint32_t* from, const uint32_t* x, int64_t stride, int64_t begin,
                       int64_t end, float* out) {
    __m512 sums[M][4];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[m][i] = _mm512_load_ps(out + m * BLOCK + 16 * i);
    }
    for (int64_t k = begin; k < end; ++k) {
      const uint32_t* at = from + k * BLOCK;
      __m512i weights[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(at + 16 * i) + 8 * AHEAD, _MM_HINT_T0);
        weights[i] = _mm512_loadu_si512(at + 16 * i);
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m512i pair = _mm512_set1_epi32(x[m * stride + k]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sums[m][i] = _mm512_dpbf16_ps(sums[m][i], (__m512bh)weights[i], (__m512bh)pair);
        }
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm512_store_ps(out + m * BLOCK + 16 * i, sums[m][i]);
    }
  }
  static constexpr decltype(&multiply<1>) RUN[TOGETHER] = {
      multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

  void write(int64_t first, const float* sums, uint16_t* y) const {
    const int64_t count = std::min(BLOCK, num_rows - first);
    for (int64_t m = 0; m < given; ++m) {
      uint16_t* to = y + m * num_rows + first;
      for (int64_t i = 0; i < count; i += 16) {
        const int64_t width = std::min<int64_t>(16, count - i);
        const __mmask16 mask = (1u << width) - 1;
        __m512 value = _mm512_loadu_ps(sums + m * BLOCK + i);
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + first + i));
        _mm256_mask_storeu_epi16(to + i, mask, (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
  }

  const uint32_t* const w;
  const float* const bias;
  int64_t pairs, given = 0;
  std::vector<uint32_t> x;
};
#endif

}  // namespace

std::unique_ptr<Product> plain_product(const void* weight, int64_t num_rows, int64_t num_columns,
                                       Number type, const float* bias) {
  if (type == Number::float32) {
    return std::make_unique<PlainProduct<float>>(weight, num_rows, num_columns, bias);
  }
  return std::make_unique<PlainProduct<uint16_t>>(weight, num_rows, num_columns, bias);
}

std::unique_ptr<Product> blocked_product(const void* weight, int64_t num_rows,
                                         int64_t num_columns, const float* bias) {
#ifdef __AVX512BF16__
  return std::make_unique<BlockedProduct>(weight, num_rows, num_columns, bias);
#else
  return nullptr;
#endif
}

}  // namespace packed
