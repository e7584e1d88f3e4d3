// What linear.cpp (which knows PyTorch) asks of rows.cpp (which knows the processor). Two files,
// since they are compiled at the same time.
#pragma once
#include <cstdint>
#include <functional>

namespace packed {

constexpr int64_t TILE = 16, CHUNK_BYTES = 64;
// More rows are multiplied by a dequantized weight. Measured for int4 [11264, 2048] on one core, in
// ms: 17 rows 3.7 directly and 9.2 dequantized, 64 rows 7.5 and 13.5; they meet near 200.
constexpr int64_t MAX_DIRECT_ROWS = 64;

enum class Number { bfloat16, float16, float32 };

// A packed weight [N, K]: values [tiles, chunks, 64] where a tile is sixteen rows and a chunk four
// bytes of each; scales and zeros [tiles, groups, 16].
struct Weight {
  const uint8_t* values;
  const char *scales, *zeros;  // zeros: null where there are none
  Number scale_type;
  int64_t num_rows, num_columns, num_tiles, num_chunks, num_groups, group_size;
  bool nibbles, mxfp4, dynamic;

  int64_t chunks_per_group() const { return group_size / (nibbles ? 8 : 4); }
  int64_t scale_bytes() const { return scale_type == Number::float32 ? 4 : 2; }
};

// Calls body(begin, end) for parts of 0..count, in several threads.
using Body = std::function<void(int64_t begin, int64_t end)>;
using Parallel = std::function<void(int64_t count, const Body& body)>;

// y [num_rows, N] = x [num_rows, K] times the weight, plus the bias [N] (or null); x and y are
// bfloat16 or float32, contiguous. Sums run over the columns in one order, whatever the number of
// rows or threads.
void multiply(const Weight& weight, Number type, const void* x, int64_t num_rows,
              const float* bias, void* y, int64_t num_threads, const Parallel& parallel);

// Tiles first..last-1 (of a weight that is not dynamic) as numbers, columns in front:
// out [K, 16 (last - first)].
void dequantize(const Weight& weight, Number type, int64_t first, int64_t last, void* out,
                const Parallel& parallel);

}  // namespace packed
