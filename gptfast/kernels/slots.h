// What attention of few tokens (attend.cpp) and of many (prompt.cpp) share: a cache read in blocks
// of 64 slots, and a query's way along them.
//
// Keys are turned, so that a vector holds one column of sixteen of them, and scores come about
// without sums across lanes. In bfloat16 a lane holds a pair of columns of a key, or a column of a
// pair of values: the processor's product of bfloat16 adds up pairs.
#pragma once
#include <algorithm>
#include <cmath>

#include "numbers.h"
#include "step.h"

namespace step {

constexpr int64_t BLOCK = 64;  // slots
constexpr int VECTORS = BLOCK / LANES;
constexpr float NONE = -INFINITY;

// What products add up in. GCC keeps vectors that are wider than the processor in memory: with AVX2
// attention took five times as long in Floats.
#ifdef __AVX512F__
typedef Floats Register;
typedef Words RegisterWords;
constexpr int REGISTERS = 4;  // of keys or values that are multiplied at a time
#else
typedef float Register __attribute__((vector_size(32)));
typedef uint32_t RegisterWords __attribute__((vector_size(32)));
constexpr int REGISTERS = 2;
#endif
constexpr int64_t WIDTH = sizeof(Register) / sizeof(float);
inline Register repeated(const void* word) {  // four bytes
  uint32_t bits;
  std::memcpy(&bits, word, sizeof(bits));
  return (Register)(RegisterWords{} + bits);
}

#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;
inline Register add_pairs(Register sums, Register a, Register b) {
  return (Register)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
inline Words paired(Floats low, Floats high) {  // 32 numbers, rounded, in their order
  return (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
inline Words interleaved(const void* a, const void* b) {  // sixteen numbers of each
  const auto wide = [](const void* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  };
  return (Words)_mm512_or_si512(wide(a), _mm512_slli_epi32(wide(b), 16));
}
#else
constexpr bool HAS_PAIRS = false;
inline Register add_pairs(Register sums, Register, Register) { return sums; }
inline Words paired(Floats, Floats) { return Words{}; }
inline Words interleaved(const void*, const void*) { return Words{}; }
#endif
template <bool PAIRS>
inline Register add_products(Register sums, Register a, Register b) {
  if constexpr (PAIRS) return add_pairs(sums, a, b);
  else return sums + a * b;
}

template <class T>
inline void grow(std::vector<T>& v, int64_t size) {
  if (v.size() < static_cast<size_t>(size)) v.resize(size);
}

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// A vector of the cache as floats, sixteen at a time. Numbers of eight bits are without their scale.
inline Floats stored_floats(Stored stored, Number type, const void* from, int64_t at, int64_t count) {
  if (stored == Stored::as_computed) return load_some(type, from, at, count);
  typedef int8_t Bytes __attribute__((vector_size(16)));
  Bytes bytes{};
  if (count == LANES) bytes = load<Bytes>(static_cast<const char*>(from) + at);
  else std::memcpy(&bytes, static_cast<const char*>(from) + at, std::max<int64_t>(count, 0));
  const Ints wide = __builtin_convertvector(bytes, Ints);
  if (stored == Stored::int8) return __builtin_convertvector(wide, Floats);
  // e4m3 at the place of a float's bits is 2^-120 of what it means.
  const Words bits = ((Words)wide << 20 & 0x07F00000u) | ((Words)wide & 0x80000000u);
  return (Floats)bits * 0x1p120f;
}

// Turns sixteen vectors of sixteen words: word j of vector i becomes word i of vector j.
#ifdef __AVX512F__
inline void turn(Words (&v)[16]) {
  Words t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28,
                                   13, 29);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27,
                                       14, 30, 15, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8,
                                             9, 24, 25, 12, 13, 28, 29);
      v[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23,
                                                 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  // v[4a + b] holds, in its four quarters q, words 4q + b of vectors 4a..4a+3.
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const Words low = __builtin_shufflevector(v[b], v[4 + b], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6,
                                              7, 20, 21, 22, 23);
    const Words high = __builtin_shufflevector(v[b], v[4 + b], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13,
                                               14, 15, 28, 29, 30, 31);
    const Words low2 = __builtin_shufflevector(v[8 + b], v[12 + b], 0, 1, 2, 3, 16, 17, 18, 19, 4,
                                               5, 6, 7, 20, 21, 22, 23);
    const Words high2 = __builtin_shufflevector(v[8 + b], v[12 + b], 8, 9, 10, 11, 24, 25, 26, 27,
                                                12, 13, 14, 15, 28, 29, 30, 31);
    t[b] = __builtin_shufflevector(low, low2, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    t[4 + b] = __builtin_shufflevector(low, low2, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                       29, 30, 31);
    t[8 + b] = __builtin_shufflevector(high, high2, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,
                                       22, 23);
    t[12 + b] = __builtin_shufflevector(high, high2, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27,
                                        28, 29, 30, 31);
  }
  std::copy(t, t + 16, v);
}
#else
inline void turn(Words (&v)[16]) {
  uint32_t from[16][16], to[16][16];
  std::memcpy(from, v, sizeof(v));
  for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) to[j][i] = from[i][j];
  }
  std::memcpy(v, to, sizeof(v));
}
#endif

// Sixteen numbers, or sixteen pairs of them, of the vector of a slot from word `at` on.
template <bool PAIRS>
inline Words slot_words(Stored stored, Number type, const void* from, int64_t at, int64_t dim) {
  if constexpr (PAIRS) {
    const int64_t first = 2 * at, count = std::min(dim - first, 2 * LANES);
    if (stored == Stored::as_computed) {
      Words words{};
      const auto p = static_cast<const uint16_t*>(from) + first;
      if (count == 2 * LANES) return load<Words>(p);
      std::memcpy(&words, p, count * 2);
      return words;
    }
    const auto low = stored_floats(stored, type, from, first, std::min(count, LANES));
    const auto high = stored_floats(stored, type, from, first + LANES, count - LANES);
    return paired(low, high);
  } else {
    return (Words)stored_floats(stored, type, from, at, std::min(dim - at, LANES));
  }
}

// A vector of the next block, while this one is computed with.
inline void fetch(const char* from, int64_t size) {
  for (int64_t at = 0; at < size; at += 64) asm volatile("prefetcht0 %0" : : "m"(from[at]));
}

// The keys [words, BLOCK] and values [BLOCK, dim] (in pairs half as many) of slots
// start+skip..start+count-1; zeros for the others of the block, whatever they hold.
template <bool PAIRS>
void read_block(const Slots& slots, Number type, int64_t row, int64_t head, int64_t start,
                int64_t skip, int64_t count, int64_t words, int64_t dim, uint32_t* keys,
                uint32_t* values) {
  const int64_t size = slots.stored == Stored::as_computed ? size_of(type) : 1;
  const auto slot = [&](const void* p, int64_t of_row, int64_t of_head, int64_t of_slot, int64_t s) {
    return static_cast<const char*>(p) +
           (row * of_row + head * of_head + (start + s) * of_slot) * size;
  };
  const bool is_plain = slots.stored == Stored::as_computed;
  for (int64_t s = 0; s < BLOCK; s += LANES) {
    const char* from[LANES];
    for (int i = 0; i < LANES; ++i) {
      from[i] = slot(slots.keys, slots.key_row, slots.key_head, slots.key_slot, s + i);
    }
    const bool whole =
        skip <= s && s + LANES <= count && is_plain && (PAIRS || size == 4);
    const int64_t ahead = BLOCK * slots.key_slot * size;
    for (const char* p : from) fetch(p + ahead, slots.key_dim * size);
    for (int64_t w = 0; w < words; w += LANES) {
      Words rows[LANES];
      if (whole && (w + LANES) * 4 <= slots.key_dim * size) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) rows[i] = load<Words>(from[i] + w * 4);
      } else {
        for (int i = 0; i < LANES; ++i) {
          rows[i] = skip <= s + i && s + i < count
                        ? slot_words<PAIRS>(slots.stored, type, from[i], w, slots.key_dim)
                        : Words{};
        }
      }
      turn(rows);
      uint32_t* to = keys + w * BLOCK + s;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(to + i * BLOCK, rows[i]);
    }
  }
  constexpr int PER_WORD = PAIRS ? 2 : 1;
  for (int64_t s = 0; s < BLOCK; s += PER_WORD) {
    const char* from =
        slot(slots.values, slots.value_row, slots.value_head, slots.value_slot, s);
    const char* behind = from + slots.value_slot * size;
    fetch(from + BLOCK * slots.value_slot * size, slots.value_dim * size * PER_WORD);
    uint32_t* to = values + s / PER_WORD * dim;
    for (int64_t at = 0; at < dim; at += LANES) {
      const int64_t rest = std::min(slots.value_dim - at, LANES);
      const auto floats = [&](int64_t slot, const char* p) {
        const bool is_in = skip <= slot && slot < count;
        return is_in ? stored_floats(slots.stored, type, p, at, rest) : Floats{};
      };
      if constexpr (PAIRS) {
        if (is_plain && rest == LANES && skip <= s && s + 1 < count) {
          store(to + at, interleaved(from + at * 2, behind + at * 2));
        } else {
          store(to + at, ((Words)floats(s, from) >> 16) |
                             ((Words)floats(s + 1, behind) & 0xFFFF0000u));
        }
      } else {
        store(to + at, floats(s, from));
      }
    }
  }
}

// ---- products ----

// out [Q, stride] = queries [Q, words] times the turned keys [words, BLOCK].
template <bool PAIRS, int Q>
inline void multiply_keys(const uint32_t* queries, int64_t words, const uint32_t* keys, float* out,
                          int64_t stride) {
  for (int64_t at = 0; at < BLOCK; at += REGISTERS * WIDTH) {
    Register sums[Q][REGISTERS] = {};
    const uint32_t* from = keys + at;
    for (int64_t w = 0; w < words; ++w, from += BLOCK) {
      Register columns[REGISTERS];
#pragma GCC unroll 4
      for (int i = 0; i < REGISTERS; ++i) columns[i] = load<Register>(from + i * WIDTH);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const Register query = repeated(queries + q * words + w);
#pragma GCC unroll 4
        for (int i = 0; i < REGISTERS; ++i) {
          sums[q][i] = add_products<PAIRS>(sums[q][i], query, columns[i]);
        }
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
      for (int i = 0; i < REGISTERS; ++i) store(out + q * stride + at + i * WIDTH, sums[q][i]);
    }
  }
}

// The weights that Q queries give to so many slots: floats, or pairs of bfloat16; `stride` is from
// one query to the next.
struct Weights {
  const float* floats;
  const uint16_t* pairs;
  int64_t stride, num_slots;
};

// R registers of the results of Q queries: sums [Q, dim] += weights times values [num_slots, dim].
template <bool PAIRS, int Q, int R>
inline void add_values(const Weights& weights, const uint32_t* values, int64_t dim, float* sums) {
  Register totals[Q][R];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) totals[q][i] = load<Register>(sums + q * dim + i * WIDTH);
  }
  const int64_t count = PAIRS ? weights.num_slots / 2 : weights.num_slots;
  for (int64_t s = 0; s < count; ++s, values += dim) {
    Register row[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) row[i] = load<Register>(values + i * WIDTH);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const int64_t at = q * weights.stride;
      const Register weight = PAIRS ? repeated(weights.pairs + at + 2 * s)
                                    : repeated(weights.floats + at + s);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) totals[q][i] = add_products<PAIRS>(totals[q][i], weight, row[i]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) store(sums + q * dim + i * WIDTH, totals[q][i]);
  }
}

template <bool PAIRS, int Q>
inline void add_values(const Weights& weights, const uint32_t* values, int64_t dim, float* sums) {
  int64_t at = 0;
  for (; at + REGISTERS * WIDTH <= dim; at += REGISTERS * WIDTH) {
    add_values<PAIRS, Q, REGISTERS>(weights, values + at, dim, sums + at);
  }
  const int64_t left = (dim - at) / WIDTH;  // none with AVX2: dim is a multiple of LANES
  if (left == 3) add_values<PAIRS, Q, 3>(weights, values + at, dim, sums + at);
  if (left == 2) add_values<PAIRS, Q, 2>(weights, values + at, dim, sums + at);
  if (left == 1) add_values<PAIRS, Q, 1>(weights, values + at, dim, sums + at);
}

// ---- queries ----

// The words of a query's numbers, `words` of them.
inline void read_query(Number type, bool pairs, const void* from, int64_t dim, int64_t words,
                       uint32_t* to) {
  for (int64_t w = 0; w < words; w += LANES) {
    store(to + w, pairs ? slot_words<true>(Stored::as_computed, type, from, w, dim)
                        : slot_words<false>(Stored::as_computed, type, from, w, dim));
  }
}

// What a query has seen so far: its largest score and the sum of e^(score - most).
struct Seen {
  float most = NONE, sum = 0;
};

// One token's query of one head, before the slots of its row.
struct Query {
  const Scoring& how;
  int64_t position;                         // -1 sees nothing
  int64_t head;                             // of the queries
  const float *key_scales, *value_scales;   // of the slots, or null

  bool sees_all(int64_t first, int64_t last) const {
    return last <= position && (!how.window || first > position - how.window);
  }

  // From products with keys to scores of sixteen slots from `at` on, of which `count` are there.
  Floats scores(Floats products, int64_t at, int64_t count, bool all_seen) const {
    Floats s = products * how.scale;
    if (key_scales && count) s *= load_some(Number::float32, key_scales, at, count);
    if (how.softcap) s = how.softcap * hyperbolic_tangent(s / how.softcap);
    if (all_seen && !how.slopes) return s;
    const Ints distance = static_cast<int32_t>(position - at) -
                          Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (how.slopes) s -= how.slopes[head] * __builtin_convertvector(distance, Floats);
    Ints seen = distance >= 0;
    if (how.window) seen &= distance < static_cast<int32_t>(how.window);
    return seen ? s : splat(NONE);
  }

  // From products [blocks, BLOCK] with the slots from `start` on, of which `count` are there, to
  // the weights of their values: in their place, or as bfloat16 in `pairs`. What `result` [dim]
  // holds shrinks where a larger score has come.
  template <bool PAIRS>
  void weigh(int64_t start, int64_t count, int64_t blocks, float* products, uint16_t* pairs,
             Seen& state, float* result, int64_t dim) const {
    Floats most = splat(NONE);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = start + b * BLOCK;
      const bool all_seen = sees_all(first, first + BLOCK - 1);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        const int64_t i = b * BLOCK + j * LANES;
        const int64_t rest = std::clamp<int64_t>(count - i, 0, LANES);
        const Floats s = scores(load<Floats>(products + i), start + i, rest, all_seen);
        store(products + i, s);
        most = larger(s, most);
      }
    }
    const float before = state.most, now = std::max(before, largest_of(most));
    const float from = now == NONE ? 0 : now;  // nothing seen yet has weights of 0, NaN that of NaN
    Floats sum{};
    const auto weight = [&](int64_t i) {
      Floats weights = exponential(load<Floats>(products + i) - from);
      sum += weights;
      if (!value_scales) return weights;
      const int64_t rest = std::clamp<int64_t>(count - i, 0, LANES);
      const Floats scales = load_some(Number::float32, value_scales, start + i, rest);
      return weights == 0 ? weights : weights * scales;  // of no slot that is not seen
    };
    for (int64_t i = 0; i < blocks * BLOCK; i += 2 * LANES) {
      const Floats low = weight(i), high = weight(i + LANES);
      if constexpr (PAIRS) {
        store(pairs + i, paired(low, high));
      } else {
        store(products + i, low);
        store(products + i + LANES, high);
      }
    }
    if (now != before) {
      const float factor = before == NONE ? 0 : exponential(splat(before - now))[0];
      state.sum *= factor;
      for (int64_t at = 0; at < dim; at += LANES) {
        store(result + at, load<Floats>(result + at) * factor);
      }
      state.most = now;
    }
    state.sum += sum_of(sum);
  }
};

// The value of a row's first slot, which padding sees, to [value_dim].
inline void first_value(const Slots& slots, Number type, int64_t row, int64_t head, void* to,
                        int64_t at) {
  const int64_t size = slots.stored == Stored::as_computed ? size_of(type) : 1;
  const char* from = static_cast<const char*>(slots.values) +
                     (row * slots.value_row + head * slots.value_head) * size;
  const int64_t scale_at = (row * slots.num_heads + head) * slots.num_slots;
  const float scale = slots.value_scales ? slots.value_scales[scale_at] : 1;
  by_lanes(slots.value_dim, [&](int64_t i, int64_t count) {
    store_some(type, to, at + i, count, stored_floats(slots.stored, type, from, i, count) * scale);
  });
}

}  // namespace step
