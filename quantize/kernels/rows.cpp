// Products of a few rows of activations with a packed weight, and its dequantization. How sixteen
// rows of the weight are read and multiplied is in avx512.h and avx2.h.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

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
namespace {

constexpr int64_t PREFETCH_BYTES = 2048;
constexpr int64_t TASK_BYTES = 256 << 10;  // of weights that a thread takes at a time

constexpr float INTEGERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float MXFP4[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};

Floats factors(const Weight& w, const char* from, int64_t tile, int64_t group) {
  const char* p = from + (tile * w.num_groups + group) * TILE * w.scale_bytes();
  if (w.scale_type == Number::bfloat16) return load_bfloat16(p);
  if (w.scale_type == Number::float16) return load_half(p);
  return load(reinterpret_cast<const float*>(p));
}

// ---- activations ----

VECTORIZED void to_floats(Number type, const void* from, int64_t count, float* to) {
  if (type == Number::float32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  const auto words = static_cast<const uint16_t*>(from);
  uint32_t* bits = reinterpret_cast<uint32_t*>(to);
  for (int64_t k = 0; k < count; ++k) bits[k] = static_cast<uint32_t>(words[k]) << 16;
}

// Magnitudes are compared as the integers that their bits are: NaN is above all, and stays.
VECTORIZED float largest(const float* row, int64_t count) {
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

VECTORIZED void to_words(const float* row, int64_t count, uint16_t* to) {
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(row);
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<uint16_t>(bits[k] >> 16);
}

// Of a multiple of four.
VECTORIZED float total(const float* row, int64_t count) {
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

  // x [given, K]; rows beyond them are zero.
  Activations(const Weight& w, Number type, const char* x, int64_t given, int64_t num_rows)
      : words(w.num_chunks * num_rows * Op::WORDS),
        starts(w.num_groups * num_rows),
        sums(w.num_groups * num_rows),
        token_scales(num_rows, 1.0f) {
    const int64_t width = w.num_chunks * Op::COLUMNS, stride = w.num_columns * (type == Number::float32 ? 4 : 2);
    std::vector<float> row(width + 16);
    std::vector<Element> elements(width + 16);
    for (int64_t m = 0; m < given; ++m) {
      to_floats(type, x + m * stride, w.num_columns, row.data());
      if constexpr (INTEGER) {
        const float scale = std::max(largest(row.data(), w.num_columns), 1e-30f) / 127;
        token_scales[m] = scale;
        to_integers(row.data(), w.num_columns, scale, elements.data());
      } else if constexpr (sizeof(Element) == 2) {
        to_words(row.data(), w.num_columns, elements.data());
      }
      if constexpr (sizeof(Element) == 4) lay_out(row.data(), w.num_chunks, m, num_rows);
      else lay_out(elements.data(), w.num_chunks, m, num_rows);
      if (!w.zeros && Op::OFFSET == 0) continue;
      if constexpr (INTEGER) add_up(w, elements.data(), m, num_rows);
      else add_up(w, row.data(), m, num_rows);
    }
  }

  void lay_out(const Element* row, int64_t num_chunks, int64_t m, int64_t num_rows) {
    char* to = reinterpret_cast<char*>(words.data()) + m * BYTES;
    const char* from = reinterpret_cast<const char*>(row);
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
        __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        v = _mm_shuffle_epi8(v, order);
        std::memcpy(to, &v, BYTES);
      }
    }
  }

  template <class Value>
  void add_up(const Weight& w, const Value* row, int64_t m, int64_t num_rows) {
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

// ---- products ----

// M rows of activations times T tiles of the weight from `first` on: out [T, M, 16]. Every loop over
// rows and tiles is unrolled: else the sums would lie in memory.
template <class Op, int M, int T>
void multiply_tiles(const Op& op, const Weight& w, const Activations<Op>& x, int64_t first,
                    float* out) {
  const uint8_t* values[T];
  int64_t tiles[T];
  for (int t = 0; t < T; ++t) {
    tiles[t] = std::min(first + t, w.num_tiles - 1);
    values[t] = w.values + tiles[t] * w.num_chunks * CHUNK_BYTES;
  }
  for (int i = 0; i < T * M; ++i) store(out + i * TILE, splat(0));
  const int64_t per_group = w.chunks_per_group();
  const int32_t* words = x.words.data();
  // What lies ahead of the end of these tiles is the beginning of the next T.
  const int64_t row_bytes = w.num_chunks * CHUNK_BYTES, to_next = (T - 1) * row_bytes;
  const int64_t scale_row = w.num_groups * TILE * w.scale_bytes();
  const int64_t scales_ahead = PREFETCH_BYTES * scale_row / row_bytes + CHUNK_BYTES;
  for (int64_t g = 0; g < w.num_groups; ++g) {
    int64_t ahead = g * TILE * w.scale_bytes() + scales_ahead;
    ahead += ahead < scale_row ? 0 : (T - 1) * scale_row;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) _mm_prefetch(w.scales + tiles[t] * scale_row + ahead, _MM_HINT_T0);
    typename Op::Sum sums[T][M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sums[t][m] = Op::start(Op::OFFSET == 0 ? 0 : x.starts[g * M + m]);
      }
    }
    const int64_t stop = std::min((g + 1) * per_group, w.num_chunks);
    for (int64_t c = g * per_group; c < stop; ++c, words += M * Op::WORDS) {
      typename Op::Chunk chunks[T];
      int64_t beyond = c * CHUNK_BYTES + PREFETCH_BYTES;
      beyond += beyond < row_bytes ? 0 : to_next;
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        _mm_prefetch(values[t] + beyond, _MM_HINT_T0);
        chunks[t] = op.read(values[t] + c * CHUNK_BYTES);
      }
#pragma GCC unroll 8
      for (int d = 0; d < Op::WORDS; ++d) {
        typename Op::Operand operands[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) operands[t] = op.operand(chunks[t], d);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            sums[t][m] = Op::dot(sums[t][m], operands[t], words + m * Op::WORDS + d);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Floats scale = factors(w, w.scales, tiles[t], g);
      const Floats zero = w.zeros ? factors(w, w.zeros, tiles[t], g) : splat(0);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        float* sum = out + (t * M + m) * TILE;
        Floats value = Op::floats(sums[t][m]);
        if (w.zeros) value = subtract_product(value, zero, splat(x.sums[g * M + m]));
        store(sum, multiply_add(scale, value, load(sum)));
      }
    }
  }
}

template <class Op>
struct Kernel {
  int rows, tiles;  // at once
  void (*run)(const Op&, const Weight&, const Activations<Op>&, int64_t, float*);
};

template <class Op, int... M>
Kernel<Op> kernel_for(int64_t num_rows, std::integer_sequence<int, M...>) {
  static constexpr Kernel<Op> ALL[] = {
      {M, tiles_at_once(M), multiply_tiles<Op, M, tiles_at_once(M)>}...};
  for (const auto& kernel : ALL) {
    if (num_rows <= kernel.rows) return kernel;
  }
  return ALL[sizeof...(M) - 1];
}

void store_as(Number type, char* p, Floats value) {
  if (type == Number::float32) store(reinterpret_cast<float*>(p), value);
  else store_bfloat16(p, value);
}

// A tile's part of a row of the result: times the token's scale, plus the bias, in its type.
void put(const Weight& w, Number type, const float* sums, float token_scale, const float* bias,
         int64_t tile, char* y, int64_t row) {
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

// As many rows of x as there is a kernel for.
template <class Op>
int64_t multiply_rows(const Weight& w, Number type, const char* x, int64_t num_rows,
                      const float* bias, char* y, int64_t num_threads, const Parallel& parallel) {
  const auto kernel = kernel_for<Op>(num_rows, RowCounts());
  num_rows = std::min<int64_t>(num_rows, kernel.rows);
  const Op op(w.mxfp4 ? MXFP4 : INTEGERS);
  const Activations<Op> activations(w, type, x, num_rows, kernel.rows);
  const int64_t bytes = kernel.tiles * w.num_chunks * CHUNK_BYTES;
  const int64_t fair = (w.num_tiles + num_threads * kernel.tiles - 1) / (num_threads * kernel.tiles);
  const int64_t step = std::clamp<int64_t>(TASK_BYTES / bytes, 1, fair) * kernel.tiles;
  std::atomic<int64_t> next{0};
  parallel(num_threads, [&](int64_t, int64_t) {
    alignas(64) float out[MAX_SUMS * TILE];
    for (int64_t start = next.fetch_add(step); start < w.num_tiles; start = next.fetch_add(step)) {
      const int64_t stop = std::min(start + step, w.num_tiles);
      for (int64_t tile = start; tile < stop; tile += kernel.tiles) {
        kernel.run(op, w, activations, tile, out);
        for (int64_t t = 0; t < std::min<int64_t>(kernel.tiles, stop - tile); ++t) {
          for (int64_t m = 0; m < num_rows; ++m) {
            put(w, type, out + (t * kernel.rows + m) * TILE, activations.token_scales[m], bias,
                tile + t, y, m);
          }
        }
      }
    }
  });
  return num_rows;
}

// ---- dequantization ----

// Four tiles side by side, so that whole cache lines are written.
template <class Op>
void dequantize_tiles(const Weight& w, Number type, int64_t first, int64_t last, int64_t width,
                      char* out) {
  constexpr int64_t TOGETHER = 4;
  const Op op(w.mxfp4 ? MXFP4 : INTEGERS);
  const int64_t size = type == Number::float32 ? 4 : 2, per_group = w.chunks_per_group();
  for (int64_t start = first; start < last; start += TOGETHER) {
    const int64_t stop = std::min(start + TOGETHER, last);
    for (int64_t g = 0; g < w.num_groups; ++g) {
      Floats scales[TOGETHER], zeros[TOGETHER];
      for (int64_t tile = start; tile < stop; ++tile) {
        scales[tile - start] = factors(w, w.scales, tile, g);
        zeros[tile - start] = w.zeros ? factors(w, w.zeros, tile, g) : splat(0);
      }
      const int64_t end = std::min((g + 1) * per_group, w.num_chunks);
      for (int64_t c = g * per_group; c < end; ++c) {
        for (int64_t tile = start; tile < stop; ++tile) {
          const auto chunk = op.read(w.values + (tile * w.num_chunks + c) * CHUNK_BYTES);
          char* to = out + (tile - first) * TILE * size;
#pragma GCC unroll 8
          for (int d = 0; d < Op::WORDS; ++d) {
            const int64_t k = c * Op::COLUMNS + Op::column(d);
            if (k >= w.num_columns) continue;
            Floats value = operand_floats(op.operand(chunk, d));
            if (Op::OFFSET != 0) value = subtract(value, splat(Op::OFFSET));
            value = product(subtract(value, zeros[tile - start]), scales[tile - start]);
            store_as(type, to + k * width * size, value);
          }
        }
      }
    }
  }
}

}  // namespace

void multiply(const Weight& w, Number type, const void* x, int64_t num_rows, const float* bias,
              void* y, int64_t num_threads, const Parallel& parallel) {
  const bool wide = type == Number::float32;
  const auto run = w.dynamic   ? w.nibbles ? multiply_rows<NibblesDynamicOp>
                                           : multiply_rows<BytesDynamicOp>
                   : w.nibbles ? wide ? multiply_rows<FloatOp<Nibbles>>
                                      : multiply_rows<Bfloat16Op<Nibbles>>
                   : wide      ? multiply_rows<FloatOp<Bytes>>
                               : multiply_rows<Bfloat16Op<Bytes>>;
  const auto from = static_cast<const char*>(x);
  const auto to = static_cast<char*>(y);
  const int64_t size = wide ? 4 : 2;
  for (int64_t done = 0; done < num_rows;) {
    done += run(w, type, from + done * w.num_columns * size, num_rows - done, bias,
                to + done * w.num_rows * size, num_threads, parallel);
  }
}

void dequantize(const Weight& w, Number type, int64_t first, int64_t last, void* out,
                const Parallel& parallel) {
  const auto run = w.nibbles ? dequantize_tiles<FloatOp<Nibbles>> : dequantize_tiles<FloatOp<Bytes>>;
  const int64_t width = (last - first) * TILE, size = type == Number::float32 ? 4 : 2;
  parallel((last - first + 3) / 4, [&](int64_t begin, int64_t end) {
    begin *= 4;
    end = std::min(end * 4, last - first);
    run(w, type, first + begin, first + end, width, static_cast<char*>(out) + begin * TILE * size);
  });
}

}  // namespace packed
