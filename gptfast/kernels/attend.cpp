// Attention of few tokens, as `attention` in attention.py says.
//
// Slots are read in blocks of 64. Keys are turned, so that a vector holds one column of sixteen of
// them, and scores come about without sums across lanes. In bfloat16 a lane holds a pair of columns
// of a key, or a column of a pair of values: the processor's product of bfloat16 adds up pairs.
#include <algorithm>
#include <cmath>

#include "numbers.h"
#include "step.h"

namespace step {
namespace {

constexpr int64_t BLOCK = 64;    // slots
constexpr int64_t CHUNK = 512;   // slots of a unit of work
constexpr int TOGETHER = 4;      // queries
constexpr float NONE = -INFINITY;

#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;
inline Floats add_products(Floats sums, Words a, Words b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
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
inline Floats add_products(Floats sums, Words, Words) { return sums; }
inline Words paired(Floats, Floats) { return Words{}; }
inline Words interleaved(const void*, const void*) { return Words{}; }
#endif

int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

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

// What a thread needs for a block of slots.
struct Scratch {
  std::vector<uint32_t> keys;     // [words, BLOCK]
  std::vector<uint32_t> values;   // [BLOCK, padded_dim], in pairs half as many
  std::vector<uint32_t> queries;  // [queries, words]
  alignas(64) float scores[TOGETHER][BLOCK];
  alignas(64) uint16_t weights[TOGETHER][BLOCK];
};

// sums += weights [Q, BLOCK] times values [BLOCK, dim].
template <bool PAIRS, int Q>
void add_values(const Scratch& scratch, int64_t dim, float* const* sums) {
  constexpr int WIDTH = 4;  // vectors at a time
  for (int64_t at = 0; at < dim; at += WIDTH * LANES) {
    const int64_t width = std::min<int64_t>((dim - at) / LANES, WIDTH);
    Floats totals[Q][WIDTH];
    for (int q = 0; q < Q; ++q) {
      for (int i = 0; i < width; ++i) totals[q][i] = load<Floats>(sums[q] + at + i * LANES);
    }
    const auto step = [&]<int W>() {
      for (int64_t s = 0; s < (PAIRS ? BLOCK / 2 : BLOCK); ++s) {
        const uint32_t* row = scratch.values.data() + s * dim + at;
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i) {
          const Words values = load<Words>(row + i * LANES);
#pragma GCC unroll 4
          for (int q = 0; q < Q; ++q) {
            if constexpr (PAIRS) {
              uint32_t pair;
              std::memcpy(&pair, scratch.weights[q] + 2 * s, 4);
              totals[q][i] = add_products(totals[q][i], Words{} + pair, values);
            } else {
              totals[q][i] += scratch.scores[q][s] * (Floats)values;
            }
          }
        }
      }
    };
    if (width == 4) step.template operator()<4>();
    else if (width == 3) step.template operator()<3>();
    else if (width == 2) step.template operator()<2>();
    else step.template operator()<1>();
    for (int q = 0; q < Q; ++q) {
      for (int i = 0; i < width; ++i) store(sums[q] + at + i * LANES, totals[q][i]);
    }
  }
}

// scores [Q, BLOCK] = queries [Q, words] times the turned keys.
template <bool PAIRS, int Q>
void multiply_keys(Scratch& scratch, int64_t first, int64_t words) {
  const uint32_t* queries = scratch.queries.data() + first * words;
  Floats sums[Q][BLOCK / LANES] = {};
  for (int64_t w = 0; w < words; ++w) {
    const uint32_t* row = scratch.keys.data() + w * BLOCK;
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK / LANES; ++i) {
      const Words keys = load<Words>(row + i * LANES);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const Words query = Words{} + queries[q * words + w];
        if constexpr (PAIRS) sums[q][i] = add_products(sums[q][i], query, keys);
        else sums[q][i] += (Floats)query * (Floats)keys;
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < BLOCK / LANES; ++i) store(scratch.scores[q] + i * LANES, sums[q][i]);
  }
}

template <bool PAIRS, int... Q>
void multiply_keys_of(int count, Scratch& scratch, int64_t first, int64_t words,
                      std::integer_sequence<int, Q...>) {
  ((count == Q + 1 ? multiply_keys<PAIRS, Q + 1>(scratch, first, words) : void()), ...);
}
template <bool PAIRS, int... Q>
void add_values_of(int count, const Scratch& scratch, int64_t dim, float* const* sums,
                   std::integer_sequence<int, Q...>) {
  ((count == Q + 1 ? add_values<PAIRS, Q + 1>(scratch, dim, sums) : void()), ...);
}

// A vector of the next block, while this one is computed with.
inline void fetch(const char* from, int64_t size) {
  for (int64_t at = 0; at < size; at += 64) asm volatile("prefetcht0 %0" : : "m"(from[at]));
}

// The keys and values of slots start+skip..start+count-1; zeros for the others of the block, whatever
// they hold.
template <bool PAIRS>
void read_block(Scratch& scratch, const Slots& slots, Number type, int64_t row, int64_t head,
                int64_t start, int64_t skip, int64_t count, int64_t words, int64_t dim) {
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
      uint32_t* to = scratch.keys.data() + w * BLOCK + s;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(to + i * BLOCK, rows[i]);
    }
  }
  constexpr int TOGETHER = PAIRS ? 2 : 1;
  for (int64_t s = 0; s < BLOCK; s += TOGETHER) {
    const char* from =
        slot(slots.values, slots.value_row, slots.value_head, slots.value_slot, s);
    const char* behind = from + slots.value_slot * size;
    fetch(from + BLOCK * slots.value_slot * size, slots.value_dim * size * TOGETHER);
    uint32_t* to = scratch.values.data() + s / TOGETHER * dim;
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

}  // namespace

void Attention::plan(const int64_t* positions, int64_t num_rows, int64_t num_tokens,
                     int64_t num_heads, const Slots& slots, int64_t seen) {
  places.assign(positions, positions + num_rows * num_tokens);
  rows.resize(num_rows);
  tokens = num_tokens;
  query_heads = num_heads;
  heads = slots.num_heads;
  group = num_heads / heads;
  queries = group * tokens;
  value_dim = slots.value_dim;
  padded_dim = padded(value_dim);
  partial_size = queries * (padded_dim + 2);
  window = seen;
  total = 0;
  const int64_t spare = slots.num_slots - 1;
  for (int64_t b = 0; b < num_rows; ++b) {
    int64_t first = spare, last = -1;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t p = places[b * tokens + t];
      if (p >= spare) {
        places[b * tokens + t] = -1;
        continue;
      }
      first = std::min(first, window ? std::max<int64_t>(p - window + 1, 0) : 0);
      last = std::max(last, p);
    }
    const int64_t first_chunk = first / CHUNK;
    rows[b] = {first_chunk, last < 0 ? 0 : last / CHUNK + 1 - first_chunk, total};
    total += rows[b].num_chunks * heads;
  }
  if (partials.size() < static_cast<size_t>(total * partial_size)) {
    partials.resize(total * partial_size);
  }
}

void Attention::run(int64_t unit, const void* q, Number type, const Slots& slots,
                    const Scoring& how) {
  size_t row = rows.size() - 1;
  while (rows[row].num_chunks == 0 || rows[row].first_unit > unit) --row;
  const int64_t within = unit - rows[row].first_unit;
  const int64_t head = within / rows[row].num_chunks;
  const int64_t chunk = rows[row].first_chunk + within % rows[row].num_chunks;
  const int64_t* positions = places.data() + row * tokens;
  const int64_t stop = *std::max_element(positions, positions + tokens) + 1;
  int64_t begin = stop;
  for (int64_t t = 0; t < tokens; ++t) {
    if (positions[t] < 0) continue;
    begin = std::min(begin, window ? std::max<int64_t>(positions[t] - window + 1, 0) : 0);
  }

  const bool pairs = HAS_PAIRS && type == Number::bfloat16;
  const int64_t words = padded(pairs ? (slots.key_dim + 1) / 2 : slots.key_dim);
  thread_local Scratch scratch;
  const auto grow = [](std::vector<uint32_t>& v, int64_t size) {
    if (v.size() < static_cast<size_t>(size)) v.resize(size);
  };
  grow(scratch.keys, words * BLOCK);
  grow(scratch.values, BLOCK * padded_dim);
  grow(scratch.queries, queries * words);

  // Query i is token i / group, head i % group of those under this key/value head.
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t at = (row * tokens + i / group) * query_heads + head * group + i % group;
    const char* from = static_cast<const char*>(q) + at * slots.key_dim * size_of(type);
    uint32_t* to = scratch.queries.data() + i * words;
    for (int64_t w = 0; w < words; w += LANES) {
      store(to + w, pairs ? slot_words<true>(Stored::as_computed, type, from, w, slots.key_dim)
                          : slot_words<false>(Stored::as_computed, type, from, w, slots.key_dim));
    }
  }
  float* maxima = partial(unit);
  float* sums = maxima + queries;
  float* results = sums + queries;
  std::fill(maxima, sums, NONE);
  std::fill(sums, results + queries * padded_dim, 0.0f);

  const int64_t end = std::min((chunk + 1) * CHUNK, stop);
  const int64_t of_scales = (row * slots.num_heads + head) * slots.num_slots;
  using Counts = std::make_integer_sequence<int, TOGETHER>;
  for (int64_t start = std::max(chunk * CHUNK, begin / BLOCK * BLOCK); start < end; start += BLOCK) {
    const int64_t count = std::min(BLOCK, end - start);
    const auto read = pairs ? read_block<true> : read_block<false>;
    const int64_t skip = std::max<int64_t>(begin - start, 0);
    read(scratch, slots, type, row, head, start, skip, count, words, padded_dim);
    for (int64_t first = 0; first < queries; first += TOGETHER) {
      const int together = std::min<int64_t>(TOGETHER, queries - first);
      if (pairs) multiply_keys_of<true>(together, scratch, first, words, Counts());
      else multiply_keys_of<false>(together, scratch, first, words, Counts());
      float* of_queries[TOGETHER];
      for (int i = 0; i < together; ++i) {
        const int64_t query = first + i, position = positions[query / group];
        const int64_t query_head = head * group + query % group;
        of_queries[i] = results + query * padded_dim;
        const bool all_seen = start + BLOCK - 1 <= position && !window && !how.slopes;
        Floats scores[BLOCK / LANES], most = splat(NONE);
        for (int j = 0; j < BLOCK / LANES; ++j) {
          Floats s = load<Floats>(scratch.scores[i] + j * LANES) * how.scale;
          const int64_t at = start + j * LANES;
          const int64_t rest = std::clamp<int64_t>(count - j * LANES, 0, LANES);
          if (slots.key_scales && rest) {
            s *= load_some(Number::float32, slots.key_scales, of_scales + at, rest);
          }
          if (how.softcap) s = how.softcap * hyperbolic_tangent(s / how.softcap);
          if (all_seen) {
            scores[j] = s;
            most = larger(s, most);
            continue;
          }
          Ints distance = (static_cast<int32_t>(position - at)) -
                          Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
          if (how.slopes) s -= how.slopes[query_head] * __builtin_convertvector(distance, Floats);
          Ints seen = distance >= 0;
          if (window) seen &= distance < static_cast<int32_t>(window);
          scores[j] = seen ? s : splat(NONE);
          most = larger(scores[j], most);
        }
        const float before = maxima[query], now = std::max(before, largest_of(most));
        if (now == NONE) {  // nothing is seen yet
          std::fill(scratch.scores[i], scratch.scores[i] + BLOCK, 0.0f);
          std::fill(scratch.weights[i], scratch.weights[i] + BLOCK, 0);
          continue;
        }
        Floats sum{};
        for (int j = 0; j < BLOCK / LANES; ++j) {
          Floats weights = exponential(scores[j] - now);
          sum += weights;
          const int64_t rest = std::clamp<int64_t>(count - j * LANES, 0, LANES);
          if (slots.value_scales && rest) {
            const Floats scales = load_some(Number::float32, slots.value_scales,
                                            of_scales + start + j * LANES, rest);
            weights = weights == 0 ? weights : weights * scales;  // of no slot that is not seen
          }
          if (pairs) store_as(Number::bfloat16, scratch.weights[i], j * LANES, weights);
          else store(scratch.scores[i] + j * LANES, weights);
        }
        if (now != before) {
          const float factor = before == NONE ? 0 : exponential(splat(before - now))[0];
          sums[query] *= factor;
          for (int64_t at = 0; at < padded_dim; at += LANES) {
            store(of_queries[i] + at, load<Floats>(of_queries[i] + at) * factor);
          }
          maxima[query] = now;
        }
        sums[query] += sum_of(sum);
      }
      if (pairs) add_values_of<true>(together, scratch, padded_dim, of_queries, Counts());
      else add_values_of<false>(together, scratch, padded_dim, of_queries, Counts());
    }
  }
}

void Attention::finish(int64_t token, Number type, const Slots& slots, const Scoring& how,
                       void* to) const {
  const Row& row = rows[token / tokens];
  thread_local std::vector<float> result;
  result.resize(padded_dim);
  for (int64_t h = 0; h < query_heads; ++h) {
    if (places[token] < 0) {
      const int64_t head = h / group, b = token / tokens;
      const int64_t size = slots.stored == Stored::as_computed ? size_of(type) : 1;
      const char* from = static_cast<const char*>(slots.values) +
                         (b * slots.value_row + head * slots.value_head) * size;
      const float scale =
          slots.value_scales ? slots.value_scales[(b * heads + head) * slots.num_slots] : 1;
      by_lanes(value_dim, [&](int64_t at, int64_t count) {
        const Floats first = stored_floats(slots.stored, type, from, at, count) * scale;
        store_some(type, to, h * value_dim + at, count, first);
      });
      continue;
    }
    const int64_t query = token % tokens * group + h % group;
    const int64_t first = row.first_unit + h / group * row.num_chunks;
    const auto of = [&](int64_t chunk) { return partial(first + chunk); };
    float most = how.sinks ? how.sinks[h] : NONE;
    for (int64_t c = 0; c < row.num_chunks; ++c) most = std::max(most, of(c)[query]);
    const auto share = [&](float maximum) {
      return maximum == NONE ? 0 : exponential(splat(maximum - most))[0];
    };
    float sum = how.sinks ? share(how.sinks[h]) : 0;
    std::fill(result.begin(), result.end(), 0.0f);
    for (int64_t c = 0; c < row.num_chunks; ++c) {
      const float factor = share(of(c)[query]);
      sum += of(c)[queries + query] * factor;
      const float* from = of(c) + 2 * queries + query * padded_dim;
      for (int64_t at = 0; at < padded_dim; at += LANES) {
        store(result.data() + at, load<Floats>(result.data() + at) + load<Floats>(from + at) * factor);
      }
    }
    const float scale = 1 / sum;
    by_lanes(value_dim, [&](int64_t at, int64_t count) {
      store_some(type, to, h * value_dim + at, count, load<Floats>(result.data() + at) * scale);
    });
  }
}

}  // namespace step
