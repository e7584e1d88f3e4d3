// Attention of many tokens, as `attention` in attention.py says: some tokens at a time pass along
// the slots that they see, a stretch after the other.
//
// Stretches lie at fixed places, so that the sums of a token depend on its position alone: neither
// on threads nor on the piece of the prompt that it comes in.
#include <atomic>

#include "slots.h"

namespace step {
namespace {

constexpr int TOGETHER = 6;             // queries: their sums fill the registers
constexpr int64_t STRETCH = 4 * BLOCK;  // slots that are turned once for all queries of a unit
// In bfloat16, 512 tokens of 32 heads of 64 (4 of keys) from slot 0 on and from 2048 on, ms with
// 96, 192 and 384 queries in a unit: 2.2, 2.1, 2.0 and 16.7, 16.0, 15.4.
constexpr int64_t UNIT_QUERIES = 384;
constexpr int64_t UNITS_PER_THREAD = 4;  // at least, where there are so many queries

// What a thread needs for a unit.
struct Scratch {
  std::vector<uint32_t> keys, values;  // of a stretch, block after block
  std::vector<uint32_t> queries;       // [queries, words]
  std::vector<float> results;          // [queries, dim]
  std::vector<Seen> seen;              // [queries]
  alignas(64) float scores[TOGETHER][STRETCH];
  alignas(64) uint16_t weights[TOGETHER][STRETCH];
};

// Some tokens of a row before the slots of a key/value head. Query i is token i / group, head
// i % group of those under it; beyond `count` they are there to fill the last `TOGETHER`.
class Unit {
 public:
  Unit(const Prompt& all, int64_t b, int64_t kv_head, int64_t first, int64_t last)
      : prompt(all),
        slots(all.slots),
        row(b),
        head(kv_head),
        first_token(first),
        group(all.num_heads / slots.num_heads),
        count((last - first) * group),
        padded_count((count + TOGETHER - 1) / TOGETHER * TOGETHER),
        words(padded(HAS_PAIRS && all.type == Number::bfloat16 ? (slots.key_dim + 1) / 2
                                                               : slots.key_dim)),
        dim(padded(slots.value_dim)) {}

  template <bool PAIRS>
  void run(Scratch& scratch) {
    read_queries(PAIRS, scratch);
    int64_t begin = slots.num_slots, end = 0;
    for (int64_t i = 0; i < count; i += group) {
      if (position(i) < 0) continue;
      begin = std::min(begin, first_seen(i));
      end = std::max(end, position(i) + 1);
    }
    for (int64_t start = begin / STRETCH * STRETCH; start < end; start += STRETCH) {
      const int64_t skip = std::max<int64_t>(begin - start, 0);
      pass<PAIRS>(scratch, start, skip, std::min(STRETCH, end - start));
    }
    write(scratch);
  }

 private:
  int64_t position(int64_t query) const {
    if (query >= count) return -1;
    const int64_t p = prompt.positions[row * prompt.num_tokens + first_token + query / group];
    return p < slots.num_slots - 1 ? p : -1;
  }
  int64_t first_seen(int64_t query) const {
    const int64_t window = prompt.how.window;
    return window ? std::max<int64_t>(position(query) - window + 1, 0) : 0;
  }
  int64_t place(int64_t query) const {  // of its vector in q and y
    const int64_t token = row * prompt.num_tokens + first_token + query / group;
    return token * prompt.num_heads + head * group + query % group;
  }

  void read_queries(bool pairs, Scratch& scratch) {
    grow(scratch.keys, words * STRETCH);
    grow(scratch.values, STRETCH * dim);
    grow(scratch.queries, padded_count * words);
    grow(scratch.results, padded_count * dim);
    scratch.seen.assign(padded_count, Seen{});
    std::fill_n(scratch.results.begin(), padded_count * dim, 0.0f);
    std::fill_n(scratch.queries.begin() + count * words, (padded_count - count) * words, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = place(i) * slots.key_dim * size_of(prompt.type);
      read_query(prompt.type, pairs, static_cast<const char*>(prompt.q) + at, slots.key_dim, words,
                 scratch.queries.data() + i * words);
    }
  }

  // All queries along the slots start+skip..start+given-1.
  template <bool PAIRS>
  void pass(Scratch& scratch, int64_t start, int64_t skip, int64_t given) {
    for (int64_t at = skip / BLOCK * BLOCK; at < given; at += BLOCK) {
      read_block<PAIRS>(slots, prompt.type, row, head, start + at, std::max(skip - at, int64_t{0}),
                        std::min(BLOCK, given - at), words, dim, scratch.keys.data() + at * words,
                        scratch.values.data() + at / (PAIRS ? 2 : 1) * dim);
    }
    for (int64_t i = 0; i < count; i += TOGETHER) {
      // The blocks that any of these queries sees.
      int64_t from = given, to = 0;
      for (int64_t j = i; j < std::min(i + TOGETHER, count); ++j) {
        if (position(j) < start) continue;
        from = std::min(from, std::max(first_seen(j) - start, int64_t{0}));
        to = std::max(to, std::min(position(j) - start + 1, given));
      }
      from = from / BLOCK * BLOCK, to = (to + BLOCK - 1) / BLOCK * BLOCK;
      if (from < to) attend<PAIRS>(scratch, i, start, from, to, given);
    }
  }

  template <bool PAIRS>
  void attend(Scratch& scratch, int64_t first, int64_t start, int64_t from, int64_t to,
              int64_t given) {
    for (int64_t at = from; at < to; at += BLOCK) {
      multiply_keys<PAIRS, TOGETHER>(scratch.queries.data() + first * words, words,
                                     scratch.keys.data() + at * words, scratch.scores[0] + at,
                                     STRETCH);
    }
    const int64_t of_scales = (row * slots.num_heads + head) * slots.num_slots;
    const auto scales = [&](const float* p) { return p ? p + of_scales : p; };
    float* results = scratch.results.data() + first * dim;
    for (int i = 0; i < TOGETHER; ++i) {
      const int64_t query = first + i;
      const Query own{prompt.how, position(query), head * group + query % group,
                      scales(slots.key_scales), scales(slots.value_scales)};
      own.weigh<PAIRS>(start + from, given - from, (to - from) / BLOCK, scratch.scores[i] + from,
                       scratch.weights[i] + from, scratch.seen[query], results + i * dim, dim);
    }
    const Weights weights{scratch.scores[0] + from, scratch.weights[0] + from, STRETCH, to - from};
    add_values<PAIRS, TOGETHER>(weights, scratch.values.data() + from / (PAIRS ? 2 : 1) * dim, dim,
                                results);
  }

  void write(const Scratch& scratch) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = place(i) * slots.value_dim;
      if (position(i) < 0) {
        first_value(slots, prompt.type, row, head, prompt.y, at);
        continue;
      }
      const Seen& seen = scratch.seen[i];
      float factor = 1 / seen.sum;
      if (prompt.how.sinks) {  // a score more, without a value
        const float sink = prompt.how.sinks[head * group + i % group];
        const float most = std::max(seen.most, sink);
        const auto share = [&](float score) { return exponential(splat(score - most))[0]; };
        factor = share(seen.most) / (seen.sum * share(seen.most) + share(sink));
      }
      const float* result = scratch.results.data() + i * dim;
      by_lanes(slots.value_dim, [&](int64_t j, int64_t lanes) {
        store_some(prompt.type, prompt.y, at + j, lanes, load<Floats>(result + j) * factor);
      });
    }
  }

  const Prompt& prompt;
  const Slots& slots;
  const int64_t row, head, first_token, group, count, padded_count, words, dim;
};

}  // namespace

bool has_prompt_attention() { return HAS_PAIRS; }

void attend(const Prompt& prompt, int64_t num_threads, const packed::Parallel& parallel) {
  const int64_t heads = prompt.slots.num_heads, group = prompt.num_heads / heads;
  const int64_t all = prompt.num_rows * heads * prompt.num_tokens * group;
  const int64_t queries = std::min(UNIT_QUERIES, all / (num_threads * UNITS_PER_THREAD));
  const int64_t tokens = std::max<int64_t>(queries / group, 1);
  const int64_t parts = (prompt.num_tokens + tokens - 1) / tokens;
  std::atomic<int64_t> next{0};
  parallel(num_threads, [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    for (int64_t i = next++; i < parts * heads * prompt.num_rows; i = next++) {
      // The last tokens, which see most, come first.
      const int64_t first = (parts - 1 - i / (heads * prompt.num_rows)) * tokens;
      Unit unit(prompt, i / heads % prompt.num_rows, i % heads, first,
                std::min(first + tokens, prompt.num_tokens));
      if (HAS_PAIRS && prompt.type == Number::bfloat16) unit.run<true>(scratch);
      else unit.run<false>(scratch);
    }
  });
}

}  // namespace step
