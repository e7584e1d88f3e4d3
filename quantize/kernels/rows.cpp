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

constexpr int64_t PREFETCH_BYTES = 8192;  // ahead of what is read: a stripe is one stream
constexpr int64_t TASK_BYTES = 256 << 10;  // of weights that a thread takes at a time

constexpr float INTEGERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float MXFP4[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};

Floats factors(const Weight& w, const char* from, int64_t tile, int64_t group) {
  const char* p = from + w.factor(tile, group) * TILE * w.scale_bytes();
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

  // x [K]
  void set_row(const Weight& w, Number type, const void* x, int64_t m) {
    const int64_t width = w.num_chunks * Op::COLUMNS;
    thread_local std::vector<float> row;
    thread_local std::vector<Element> elements;
    row.resize(std::max<size_t>(row.size(), width + 16));
    elements.resize(std::max<size_t>(elements.size(), width + 16));
    to_floats(type, x, w.num_columns, row.data());
    std::fill(row.begin() + w.num_columns, row.begin() + width, 0.0f);
    std::fill(elements.begin() + w.num_columns, elements.begin() + width, 0);
    if constexpr (INTEGER) {
      const float scale = std::max(largest(row.data(), w.num_columns), 1e-30f) / 127;
      token_scales[m] = scale;
      to_integers(row.data(), w.num_columns, scale, elements.data());
    } else if constexpr (sizeof(Element) == 2) {
      to_words(row.data(), w.num_columns, elements.data());
    }
    if constexpr (sizeof(Element) == 4) lay_out(row.data(), w.num_chunks, m);
    else lay_out(elements.data(), w.num_chunks, m);
    if (!w.zeros && Op::OFFSET == 0) return;
    if constexpr (INTEGER) add_up(w, elements.data(), m);
    else add_up(w, row.data(), m);
  }

  void lay_out(const Element* row, int64_t num_chunks, int64_t m) {
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
    values[t] = w.chunk(tiles[t], 0);
  }
  for (int i = 0; i < T * M; ++i) store(out + i * TILE, splat(0));
  const int64_t per_group = w.chunks_per_group();
  const int32_t* words = x.words.data();
  // As far ahead lie the scales of what is fetched.
  const int64_t scale_bytes = TILE * w.scale_bytes();
  const int64_t groups_ahead = PREFETCH_BYTES / (per_group * STRIPE * CHUNK_BYTES) + 1;
  for (int64_t g = 0; g < w.num_groups; ++g) {
    const char* scales = w.scales + w.factor(first, g + groups_ahead) * scale_bytes;
    for (int i = 0; i < T * scale_bytes; i += 64) _mm_prefetch(scales + i, _MM_HINT_T0);
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
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const uint8_t* at = values[t] + c * STRIPE * CHUNK_BYTES;
        _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_T0);
        chunks[t] = op.read(at);
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

// Rows are multiplied as many at a time as there is a kernel for.
template <class Op>
class QuantizedProduct : public Product {
 public:
  QuantizedProduct(const Weight& weight, Number number, const float* added)
      : w(weight), type(number), bias(added), op(w.mxfp4 ? MXFP4 : INTEGERS) {
    num_rows = w.num_rows;
    num_columns = w.num_columns;
    num_units = (w.num_tiles + UNIT_TILES - 1) / UNIT_TILES;
    unit_bytes = UNIT_TILES * w.num_chunks * CHUNK_BYTES;
    start = w.values;
  }

  void begin(int64_t count) override {
    kernel = kernel_for<Op>(count, RowCounts());
    given = count;
    parts.resize((count + kernel.rows - 1) / kernel.rows);
    for (auto& part : parts) {
      part.begin(w, std::min<int64_t>(count, kernel.rows), kernel.rows);
      count -= kernel.rows;
    }
  }

  void set_row(int64_t row, const void* x) override {
    parts[row / kernel.rows].set_row(w, type, x, row % kernel.rows);
  }

  void run(int64_t first, int64_t last, void* y) const override {
    alignas(64) float out[MAX_SUMS * TILE];
    const int64_t stop = std::min(last * UNIT_TILES, w.num_tiles);
    for (int64_t tile = first * UNIT_TILES; tile < stop; tile += kernel.tiles) {
      for (size_t p = 0; p < parts.size(); ++p) {
        kernel.run(op, w, parts[p], tile, out);
        const int64_t count = std::min<int64_t>(given - p * kernel.rows, kernel.rows);
        for (int64_t t = 0; t < std::min<int64_t>(kernel.tiles, stop - tile); ++t) {
          for (int64_t m = 0; m < count; ++m) {
            put(w, type, out + (t * kernel.rows + m) * TILE, parts[p].token_scales[m], bias,
                tile + t, static_cast<char*>(y), p * kernel.rows + m);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t UNIT_TILES = STRIPE;
  const Weight w;
  const Number type;
  const float* const bias;
  const Op op;
  Kernel<Op> kernel{};
  int64_t given = 0;
  std::vector<Activations<Op>> parts;
};

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
          const auto chunk = op.read(w.chunk(tile, c));
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

std::unique_ptr<Product> quantized_product(const Weight& w, Number type, const float* bias) {
  const auto make = [&]<class Op>() -> std::unique_ptr<Product> {
    return std::make_unique<QuantizedProduct<Op>>(w, type, bias);
  };
  const bool wide = type == Number::float32;
  if (w.dynamic && w.nibbles) return make.operator()<NibblesDynamicOp>();
  if (w.dynamic) return make.operator()<BytesDynamicOp>();
  if (w.nibbles && wide) return make.operator()<FloatOp<Nibbles>>();
  if (w.nibbles) return make.operator()<Bfloat16Op<Nibbles>>();
  if (wide) return make.operator()<FloatOp<Bytes>>();
  return make.operator()<Bfloat16Op<Bytes>>();
}

void multiply(Product& product, Number type, const void* x, int64_t num_rows, void* y,
              int64_t num_threads, const Parallel& parallel) {
  const int64_t size = type == Number::float32 ? 4 : 2;
  const int64_t units = product.num_units;
  const int64_t fair = (units + num_threads - 1) / num_threads;
  const int64_t step = std::clamp<int64_t>(TASK_BYTES / product.unit_bytes, 1, fair);
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(y);
  for (int64_t done = 0; done < num_rows; done += MAX_ROWS) {
    const int64_t count = std::min(num_rows - done, MAX_ROWS);
    product.begin(count);
    for (int64_t m = 0; m < count; ++m) {
      product.set_row(m, from + (done + m) * product.num_columns * size);
    }
    std::atomic<int64_t> next{0};
    parallel(num_threads, [&](int64_t, int64_t) {
      for (int64_t unit = next.fetch_add(step); unit < units; unit = next.fetch_add(step)) {
        product.run(unit, std::min(unit + step, units), to + done * product.num_rows * size);
      }
    });
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
