// Products of a few rows of activations with a packed weight. How sixteen rows of the weight are
// read and multiplied is in avx512.h and avx2.h.
#include <algorithm>
#include <atomic>
#include <vector>

#include "activations.h"

namespace packed {
namespace {

constexpr int64_t PREFETCH_BYTES = 8192;  // ahead of what is read: a stripe is one stream
constexpr int64_t TASK_BYTES = 256 << 10;  // of weights that a thread takes at a time

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
        _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_NTA);
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

}  // namespace packed
