// What those that know PyTorch (linear.cpp; whoever links to this library) ask of rows.cpp,
// gemm.cpp and plain.cpp, which know the processor. Several files, since they are compiled at the
// same time.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#define EXPORTED __attribute__((visibility("default")))

namespace packed {

constexpr int64_t TILE = 16, CHUNK_BYTES = 64, STRIPE = 4;

enum class Number { bfloat16, float16, float32 };

// A packed weight [N, K]: values [tiles / 4, chunks, 4, 64] where a tile is sixteen rows and a chunk
// four bytes of each; scales and zeros [tiles / 4, groups, 4, 16]. Four tiles lie side by side, since
// memory is read fastest as one stream.
struct Weight {
  const uint8_t* values;
  const char *scales, *zeros;  // zeros: null where there are none
  Number scale_type;
  int64_t num_rows, num_columns, num_tiles, num_chunks, num_groups, group_size;
  bool nibbles, mxfp4, dynamic;

  const uint8_t* chunk(int64_t tile, int64_t chunk) const {
    return values + ((tile / STRIPE * num_chunks + chunk) * STRIPE + tile % STRIPE) * CHUNK_BYTES;
  }
  // Which sixteen of the scales.
  int64_t factor(int64_t tile, int64_t group) const {
    return (tile / STRIPE * num_groups + group) * STRIPE + tile % STRIPE;
  }
  int64_t chunks_per_group() const { return group_size / (nibbles ? 8 : 4); }
  int64_t scale_bytes() const { return scale_type == Number::float32 ? 4 : 2; }
};

// A weight [N, K] that is multiplied by up to MAX_ROWS rows of activations together, in several
// threads: begin, then set_row for every row, then run for every unit, with a barrier of the
// caller's between. A row's sums run over its columns in one order, whatever the number of rows or
// threads. Rows are bfloat16 or float32, the type that the product was made for, and so are results.
class Product {
 public:
  int64_t num_rows, num_columns;  // N and K
  int64_t num_units;              // of work: N in parts
  int64_t unit_bytes;             // of weights that one reads
  const uint8_t* start;           // of the first unit's weights; others follow

  virtual ~Product() = default;
  virtual void begin(int64_t count) = 0;                   // so many rows; in one thread
  virtual void set_row(int64_t row, const void* x) = 0;    // [K]; rows in any thread
  virtual void run(int64_t first, int64_t last, void* y) const = 0;  // units, into y [count, N]
};
constexpr int64_t MAX_ROWS = 16;

// `bias` [N] or null. What the pointers point to has to outlive the product.
EXPORTED std::unique_ptr<Product> quantized_product(const Weight& weight, Number type,
                                                    const float* bias);
// A weight as it is stored, [N, K] in `type`.
EXPORTED std::unique_ptr<Product> plain_product(const void* weight, int64_t num_rows,
                                                int64_t num_columns, Number type,
                                                const float* bias);
// A bfloat16 weight as oneDNN lays it out: [N / 64, K / 32 * 16, 64, 2], 64 rows by pairs of columns,
// with zeros where N or K end before. Null where the processor has no product of bfloat16.
EXPORTED std::unique_ptr<Product> blocked_product(const void* weight, int64_t num_rows,
                                                  int64_t num_columns, const float* bias);

// Calls body(begin, end) for parts of 0..count, in several threads.
using Body = std::function<void(int64_t begin, int64_t end)>;
using Parallel = std::function<void(int64_t count, const Body& body)>;

// y [num_rows, N] = x [num_rows, K] times the product's weight, contiguous, in its type.
void multiply(Product& product, Number type, const void* x, int64_t num_rows, void* y,
              int64_t num_threads, const Parallel& parallel);

// The same for many rows: what is read of the weight is decoded once for all of them. `bias` [N] or
// null. Sums of grouped weights that are not dynamic are of scaled numbers in the type of x, so their
// last bits differ from those of a Product.
void multiply_many(const Weight& weight, Number type, const void* x, int64_t num_rows,
                   const float* bias, void* y, int64_t num_threads, const Parallel& parallel);
// Fewer rows are multiplied by a Product.
constexpr int64_t MIN_MANY_ROWS = 65;

}  // namespace packed
