// Products of many rows of activations with a packed weight. A panel, which is some columns of a
// few tiles, is decoded once and multiplied with all rows, a block of them at a time.
#include <atomic>
#include <memory>

#include "activations.h"

namespace packed {
namespace {

// A block's rows times a panel's tiles are as many sums as the registers hold, or half of them
// where sums of groups become part of others.
#ifdef __AVX512BF16__
constexpr int ROWS = 6, TILES = STRIPE;

// (w - zero) * scale: floats, or pairs of bfloat16.
template <class Op>
typename Op::Operand scaled(__m512i w, Floats zero, Floats scale) {
  const auto value = [&](__m512i bits) {
    return product(subtract(_mm512_castsi512_ps(bits), zero), scale);
  };
  if constexpr (sizeof(typename Op::Element) == 4) return _mm512_castps_si512(value(w));
  alignas(64) static constexpr uint16_t ORDER[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const Floats low = value(_mm512_slli_epi32(w, 16));
  const Floats high = value(_mm512_and_si512(w, _mm512_set1_epi32(0xFFFF0000)));
  const auto words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), words);
}
#else
constexpr int ROWS = 4, TILES = 1;

template <class Op>
typename Op::Operand scaled(Operand256 w, Floats zero, Floats scale) {
  const Floats value = product(subtract(operand_floats(w), zero), scale);
  return each_float([&](int i) { return value.v[i]; });
}
#endif

constexpr int64_t LAID_OUT_ROWS = 512;  // of activations at a time

template <class T>
using Buffer = std::unique_ptr<T[]>;

// Chunks first..last-1 of the tiles from `tile` on: operands [chunks, WORDS, TILES]. Grouped floats
// are scaled here, and rounded to the type of x; of everything else the sums are scaled later.
template <class Op>
struct Panel {
  static constexpr bool INTEGER = Activations<Op>::INTEGER;
  // A panel is read again for every block of rows and should stay in a near cache. Measured for 512
  // rows [11264, 2048], two cores, panels of 24, 256 and 512 KiB: int4 924, 984 and 965 GFLOP/s;
  // int4-dynamic 1230, 1151 and 1142.
  static constexpr int64_t BYTES = 256 << 10, GROUPED_INTEGER_BYTES = 24 << 10;
  using Operand = typename Op::Operand;

  const Weight& w;
  const Op op;
  const bool is_grouped, is_scaled;
  const int64_t per_group, chunks_at_once;
  int64_t first = 0, last = 0;
  Buffer<Operand> operands;
  Buffer<Floats> scales, zeros;  // [groups, TILES], of the sums

  explicit Panel(const Weight& weight)
      : w(weight),
        op(w.mxfp4 ? MXFP4 : INTEGERS),
        is_grouped(w.num_groups > 1),
        is_scaled(is_grouped && !INTEGER),
        per_group(w.chunks_per_group()),
        chunks_at_once(most_chunks()),
        operands(new Operand[chunks_at_once * Op::WORDS * TILES]) {
    const int64_t count = (is_scaled ? 1 : (chunks_at_once + per_group - 1) / per_group) * TILES;
    scales.reset(new Floats[count]);
    std::fill(scales.get(), scales.get() + count, splat(1));
    if (w.zeros && !is_scaled) zeros.reset(new Floats[count]);
  }

  bool is_whole() const { return chunks_at_once == w.num_chunks; }
  bool is_last() const { return last == w.num_chunks; }

  void read(int64_t tile, int64_t from) {
    first = from, last = std::min(first + chunks_at_once, w.num_chunks);
    Operand* to = operands.get();
    for (int64_t c = first; c < last;) {
      const int64_t g = c / per_group, stop = std::min((g + 1) * per_group, last);
      const int64_t group = is_grouped ? (c - first) / per_group : 0;
      Floats scale[TILES], zero[TILES];
      for (int t = 0; t < TILES; ++t) {
        scale[t] = factors(w, w.scales, tile + t, g);
        zero[t] = w.zeros ? factors(w, w.zeros, tile + t, g) : splat(0);
        if (is_scaled) zero[t] = add(zero[t], splat(Op::OFFSET));
        else scales[group * TILES + t] = scale[t];
        if (zeros) zeros[group * TILES + t] = zero[t];
      }
      for (; c < stop; ++c, to += Op::WORDS * TILES) {
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) {
          const auto chunk = op.read(w.chunk(tile + t, c));
#pragma GCC unroll 8
          for (int d = 0; d < Op::WORDS; ++d) {
            const Operand plain = op.operand(chunk, d);
            if constexpr (INTEGER) to[d * TILES + t] = plain;
            else to[d * TILES + t] = is_scaled ? scaled<Op>(plain, zero[t], scale[t]) : plain;
          }
        }
      }
    }
  }

 private:
  // Sums of integers do not go on in the middle of a group.
  int64_t most_chunks() const {
    const bool by_group = INTEGER && is_grouped;
    const int64_t unit = by_group ? per_group : 1;
    const int64_t bytes = by_group ? GROUPED_INTEGER_BYTES : BYTES;
    const int64_t units = bytes / (unit * Op::WORDS * TILES * CHUNK_BYTES);
    return std::min(std::max<int64_t>(units, 1) * unit, w.num_chunks);
  }
};

// Unrolled: else the sums would lie in memory.
template <class Sum, int R, class F>
inline void each_sum(Sum (&sums)[R][TILES], F f) {
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 8
    for (int t = 0; t < TILES; ++t) f(sums[m][t], m, t);
  }
}

// sums += the words of so many chunks of R rows times the operands.
template <class Op, int R>
inline void multiply_chunks(const int32_t* words, const typename Op::Operand* operands,
                            int64_t num_chunks, typename Op::Sum (&sums)[R][TILES]) {
  for (int64_t c = 0; c < num_chunks; ++c, words += R * Op::WORDS) {
#pragma GCC unroll 8
    for (int d = 0; d < Op::WORDS; ++d, operands += TILES) {
      each_sum(sums, [&](auto& sum, int m, int t) __attribute__((always_inline)) {
        sum = Op::dot(sum, operands[t], words + m * Op::WORDS + d);
      });
    }
  }
}

// results += scale * (sum - zero * sum of activations), of one group.
template <class Op, int R>
inline void scale_sums(const Activations<Op>& x, int64_t group, const Floats* scales,
                       const Floats* zeros, typename Op::Sum (&sums)[R][TILES],
                       Floats (&results)[R][TILES]) {
  each_sum(sums, [&](auto& sum, int m, int t) {
    Floats value = Op::floats(sum);
    if (zeros) value = subtract_product(value, zeros[t], splat(x.sums[group * R + m]));
    results[m][t] = multiply_add(scales[t], value, results[m][t]);
  });
}

// R rows times a panel whose sums go through all columns: they lie in `out` [R, TILES] until the
// last panel makes them results.
template <class Op, int R>
void multiply_block(const Activations<Op>& x, const Panel<Op>& panel, Floats* out) {
  using Sum = typename Op::Sum;
  static_assert(sizeof(Sum) == sizeof(Floats));
  Sum* held = reinterpret_cast<Sum*>(out);
  Sum sums[R][TILES];
  each_sum(sums, [&](Sum& sum, int m, int t) {
    sum = panel.first ? held[m * TILES + t] : Op::start(x.starts[m]);
  });
  const int32_t* words = x.words.data() + panel.first * R * Op::WORDS;
  multiply_chunks<Op, R>(words, panel.operands.get(), panel.last - panel.first, sums);
  if (!panel.is_last()) {
    each_sum(sums, [&](Sum& sum, int m, int t) { held[m * TILES + t] = sum; });
    return;
  }
  Floats results[R][TILES];
  each_sum(results, [&](Floats& result, int, int) { result = splat(0); });
  scale_sums<Op, R>(x, 0, panel.scales.get(), panel.zeros.get(), sums, results);
  each_sum(results, [&](Floats& result, int m, int t) { out[m * TILES + t] = result; });
}

// The same where every group has sums of its own.
template <class Op, int R>
void multiply_groups(const Activations<Op>& x, const Panel<Op>& panel, Floats* out) {
  const int32_t* words = x.words.data() + panel.first * R * Op::WORDS;
  const auto* operands = panel.operands.get();
  const Floats *scales = panel.scales.get(), *zeros = panel.zeros.get();
  Floats results[R][TILES];
  each_sum(results, [&](Floats& result, int m, int t) {
    result = panel.first ? out[m * TILES + t] : splat(0);
  });
  for (int64_t c = panel.first; c < panel.last; c += panel.per_group) {
    const int64_t g = c / panel.per_group, count = std::min(panel.per_group, panel.last - c);
    typename Op::Sum sums[R][TILES];
    each_sum(sums, [&](auto& sum, int m, int) { sum = Op::start(x.starts[g * R + m]); });
    multiply_chunks<Op, R>(words, operands, count, sums);
    scale_sums<Op, R>(x, g, scales, zeros, sums, results);
    words += count * R * Op::WORDS, operands += count * Op::WORDS * TILES;
    scales += TILES, zeros += zeros ? TILES : 0;
  }
  each_sum(results, [&](Floats& result, int m, int t) { out[m * TILES + t] = result; });
}

template <class Op>
struct Kernel {
  int rows;  // at once
  void (*run)(const Activations<Op>&, const Panel<Op>&, Floats*);
};

template <class Op>
Kernel<Op> kernel_for(const Weight& w) {
  if constexpr (Panel<Op>::INTEGER) {
    if (w.num_groups > 1) return {ROWS / 2, multiply_groups<Op, ROWS / 2>};
  }
  return {ROWS, multiply_block<Op, ROWS>};
}

// Up to LAID_OUT_ROWS rows.
template <class Op>
void multiply_rows(const Weight& w, Number type, const char* x, int64_t num_rows,
                   const float* bias, char* y, int64_t num_threads, const Parallel& parallel) {
  const auto [rows, run] = kernel_for<Op>(w);
  const int64_t row_bytes = w.num_columns * (type == Number::float32 ? 4 : 2);
  const bool with_sums = Panel<Op>::INTEGER || w.num_groups == 1;
  std::vector<Activations<Op>> blocks((num_rows + rows - 1) / rows);
  parallel(blocks.size(), [&, rows = rows](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * rows, given = std::min<int64_t>(num_rows - first, rows);
      blocks[b].begin(w, given, rows);
      for (int64_t m = 0; m < given; ++m) {
        blocks[b].set_row(w, type, x + (first + m) * row_bytes, m, with_sums);
      }
    }
  });
  std::atomic<int64_t> next{0};
  parallel(num_threads, [&, rows = rows, run = run](int64_t, int64_t) {
    Panel<Op> panel(w);
    const int64_t block_sums = panel.is_whole() ? 0 : rows * TILES;  // from one to the next
    const int64_t num_sums = std::max<int64_t>(blocks.size() * block_sums, rows * TILES);
    const Buffer<Floats> sums(new Floats[num_sums]);
    for (int64_t tile = next.fetch_add(TILES); tile < w.num_tiles; tile = next.fetch_add(TILES)) {
      const int64_t num_tiles = std::min<int64_t>(TILES, w.num_tiles - tile);
      for (int64_t first = 0; first < w.num_chunks; first = panel.last) {
        panel.read(tile, first);
        for (size_t b = 0; b < blocks.size(); ++b) {
          Floats* out = &sums[b * block_sums];
          run(blocks[b], panel, out);
          if (!panel.is_last()) continue;
          for (int64_t m = 0; m < std::min<int64_t>(rows, num_rows - b * rows); ++m) {
            for (int64_t t = 0; t < num_tiles; ++t) {
              const auto part = reinterpret_cast<const float*>(out + m * TILES + t);
              put(w, type, part, blocks[b].token_scales[m], bias, tile + t, y, b * rows + m);
            }
          }
        }
      }
    }
  });
}

}  // namespace

void multiply_many(const Weight& w, Number type, const void* x, int64_t num_rows, const float* bias,
                   void* y, int64_t num_threads, const Parallel& parallel) {
  const bool wide = type == Number::float32;
  const auto run = w.dynamic   ? w.nibbles ? multiply_rows<NibblesDynamicOp>
                                           : multiply_rows<BytesDynamicOp>
                   : w.nibbles ? wide ? multiply_rows<FloatOp<Nibbles>>
                                      : multiply_rows<Bfloat16Op<Nibbles>>
                   : wide      ? multiply_rows<FloatOp<Bytes>>
                               : multiply_rows<Bfloat16Op<Bytes>>;
  const int64_t size = wide ? 4 : 2;
  for (int64_t done = 0; done < num_rows; done += LAID_OUT_ROWS) {
    run(w, type, static_cast<const char*>(x) + done * w.num_columns * size,
        std::min(LAID_OUT_ROWS, num_rows - done), bias,
        static_cast<char*>(y) + done * w.num_rows * size, num_threads, parallel);
  }
}

}  // namespace packed
