// Attention of few tokens, as `attention` in attention.py says.
#include "slots.h"

namespace step {
namespace {

constexpr int64_t CHUNK = 512;  // slots of a unit of work
constexpr int TOGETHER = 4;     // queries

// What a thread needs for a block of slots; see read_block.
struct Scratch {
  std::vector<uint32_t> keys, values;
  std::vector<uint32_t> queries;  // [queries, words]
  alignas(64) float scores[TOGETHER][BLOCK];
  alignas(64) uint16_t weights[TOGETHER][BLOCK];
};

template <bool PAIRS, int... Q>
void multiply_keys_of(int count, const uint32_t* queries, int64_t words, Scratch& scratch,
                      std::integer_sequence<int, Q...>) {
  const uint32_t* keys = scratch.keys.data();
  float* out = scratch.scores[0];
  ((count == Q + 1 ? multiply_keys<PAIRS, Q + 1>(queries, words, keys, out, BLOCK) : void()), ...);
}
template <bool PAIRS, int... Q>
void add_values_of(int count, const Scratch& scratch, int64_t dim, float* results,
                   std::integer_sequence<int, Q...>) {
  const Weights weights{scratch.scores[0], scratch.weights[0], BLOCK, BLOCK};
  const uint32_t* values = scratch.values.data();
  ((count == Q + 1 ? add_values<PAIRS, Q + 1>(weights, values, dim, results) : void()), ...);
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
  total = 0;
  const int64_t spare = slots.num_slots - 1;
  for (int64_t b = 0; b < num_rows; ++b) {
    int64_t begin = spare, end = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t& p = places[b * tokens + t];
      if (p >= spare) {
        p = -1;
        continue;
      }
      begin = std::min(begin, seen ? std::max<int64_t>(p - seen + 1, 0) : 0);
      end = std::max(end, p + 1);
    }
    const int64_t num_chunks = end ? (end - 1) / CHUNK + 1 - begin / CHUNK : 0;
    rows[b] = {begin, end, num_chunks, total};
    total += num_chunks * heads;
  }
  if (partials.size() < static_cast<size_t>(total * partial_size)) {
    partials.resize(total * partial_size);
  }
}

void Attention::run(int64_t unit, const void* q, Number type, const Slots& slots,
                    const Scoring& how) {
  size_t row = rows.size() - 1;
  while (rows[row].num_chunks == 0 || rows[row].first_unit > unit) --row;
  const Row& own = rows[row];
  const int64_t within = unit - own.first_unit, head = within / own.num_chunks;
  const int64_t chunk = own.begin / CHUNK + within % own.num_chunks;
  const Part part{static_cast<int64_t>(row), head, std::max(chunk * CHUNK, own.begin),
                  std::min((chunk + 1) * CHUNK, own.end)};
  if (HAS_PAIRS && type == Number::bfloat16) run<true>(part, q, type, slots, how, partial(unit));
  else run<false>(part, q, type, slots, how, partial(unit));
}

template <bool PAIRS>
void Attention::run(const Part& part, const void* q, Number type, const Slots& slots,
                    const Scoring& how, float* to) const {
  const int64_t words = padded(PAIRS ? (slots.key_dim + 1) / 2 : slots.key_dim);
  thread_local Scratch scratch;
  grow(scratch.keys, words * BLOCK);
  grow(scratch.values, BLOCK * padded_dim);
  grow(scratch.queries, queries * words);
  // Query i is token i / group, head i % group of those under this key/value head.
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t token = part.row * tokens + i / group;
    const int64_t at = token * query_heads + part.head * group + i % group;
    const char* from = static_cast<const char*>(q) + at * slots.key_dim * size_of(type);
    read_query(type, PAIRS, from, slots.key_dim, words, scratch.queries.data() + i * words);
  }
  Seen* seen = reinterpret_cast<Seen*>(to);
  float* results = to + 2 * queries;
  std::fill(seen, seen + queries, Seen{});
  std::fill(results, results + queries * padded_dim, 0.0f);

  const int64_t* positions = places.data() + part.row * tokens;
  const int64_t of_scales = (part.row * slots.num_heads + part.head) * slots.num_slots;
  const auto scales = [&](const float* p) { return p ? p + of_scales : p; };
  using Counts = std::make_integer_sequence<int, TOGETHER>;
  for (int64_t start = part.begin / BLOCK * BLOCK; start < part.end; start += BLOCK) {
    const int64_t count = std::min(BLOCK, part.end - start);
    read_block<PAIRS>(slots, type, part.row, part.head, start,
                      std::max<int64_t>(part.begin - start, 0), count, words, padded_dim,
                      scratch.keys.data(), scratch.values.data());
    for (int64_t first = 0; first < queries; first += TOGETHER) {
      const int together = std::min<int64_t>(TOGETHER, queries - first);
      const uint32_t* from = scratch.queries.data() + first * words;
      multiply_keys_of<PAIRS>(together, from, words, scratch, Counts());
      for (int i = 0; i < together; ++i) {
        const int64_t at = first + i;
        const Query query{how, positions[at / group], part.head * group + at % group,
                          scales(slots.key_scales), scales(slots.value_scales)};
        query.weigh<PAIRS>(start, count, 1, scratch.scores[i], scratch.weights[i], seen[at],
                           results + at * padded_dim, padded_dim);
      }
      add_values_of<PAIRS>(together, scratch, padded_dim, results + first * padded_dim, Counts());
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
      first_value(slots, type, token / tokens, h / group, to, h * value_dim);
      continue;
    }
    const int64_t query = token % tokens * group + h % group;
    const int64_t first = row.first_unit + h / group * row.num_chunks;
    const auto seen = [&](int64_t chunk) {
      return reinterpret_cast<const Seen*>(partial(first + chunk))[query];
    };
    float most = how.sinks ? how.sinks[h] : NONE;
    for (int64_t c = 0; c < row.num_chunks; ++c) most = std::max(most, seen(c).most);
    const auto share = [&](float maximum) {
      return maximum == NONE ? 0 : exponential(splat(maximum - most))[0];
    };
    float sum = how.sinks ? share(how.sinks[h]) : 0;
    std::fill(result.begin(), result.end(), 0.0f);
    for (int64_t c = 0; c < row.num_chunks; ++c) {
      const float factor = share(seen(c).most);
      sum += seen(c).sum * factor;
      const float* from = partial(first + c) + 2 * queries + query * padded_dim;
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
