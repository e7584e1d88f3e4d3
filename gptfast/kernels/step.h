// A decode step of a stack of blocks on a CPU, in one parallel region. step.cpp knows PyTorch;
// blocks.cpp knows the order of a block's parts, attend.cpp and slots.h attention; numbers.h the
// processor. Beside the step, prompt.cpp has the attention of many tokens.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "shared.h"

namespace step {

using packed::Number;
using packed::Product;

// ---- threads ----

// Parts 0..count-1 of one phase of a step. Each thread has a stretch of its own, and helps others at
// its end. A phase is over when its parts are, not when all threads have come: one that the system
// has put aside holds up nothing but the part that it is at.
class Shares {
 public:
  void begin(int64_t count, int64_t grain, int num_threads);
  // The next parts for a thread; false when there are none left to take.
  bool take(int thread, int64_t* first, int64_t* last);
  void finish(int64_t count) { pending.fetch_sub(count, std::memory_order_acq_rel); }
  // Until all parts are finished. Spins: a wait is mostly a few microseconds, and the fork and join
  // of OpenMP is longer. After a while it offers its processor to others.
  void wait() const;

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  alignas(64) std::atomic<int64_t> pending{0};
  std::unique_ptr<Share[]> shares;
  int count = 0;
  int64_t grain = 1;
};

// ---- attention ----

enum class Stored { as_computed, int8, fp8 };

// Keys [rows, heads, slots, key_dim] and values [.., value_dim] of a layer; strides count elements.
// Scales, where numbers have eight bits: [rows, heads, slots].
struct Slots {
  void *keys, *values;
  float *key_scales, *value_scales;
  Stored stored;
  int64_t num_rows, num_heads, num_slots, key_dim, value_dim;
  int64_t key_row, key_head, key_slot, value_row, value_head, value_slot;
};

struct Scoring {
  float scale;
  int64_t window;                // 0: all slots up to the token's own are seen
  float softcap;                 // 0: none
  const float *sinks, *slopes;   // of each query head, or null
};

// Attention of few tokens [B, T] over the slots of their rows. Slots are read in chunks at fixed
// places, so that the sums of a token depend neither on threads nor on other rows.
class Attention {
 public:
  // positions [B, T]; one at `num_slots - 1`, the spare slot, is padding: it sees the first slot.
  void plan(const int64_t* positions, int64_t num_rows, int64_t num_tokens, int64_t num_heads,
            const Slots& slots, int64_t window);
  int64_t num_units() const { return total; }
  // q [B, T, H, key_dim] in `type`
  void run(int64_t unit, const void* q, Number type, const Slots& slots, const Scoring& how);
  // Token m of B * T: its heads' results, in `type`, to [H, value_dim].
  void finish(int64_t token, Number type, const Slots& slots, const Scoring& how, void* to) const;

 private:
  struct Row {
    int64_t begin, end, num_chunks, first_unit;  // the slots that its tokens see
  };
  struct Part {
    int64_t row, head, begin, end;  // some slots of a key/value head
  };
  template <bool PAIRS>
  void run(const Part& part, const void* q, Number type, const Slots& slots, const Scoring& how,
           float* to) const;
  float* partial(int64_t unit) { return partials.data() + unit * partial_size; }
  const float* partial(int64_t unit) const { return partials.data() + unit * partial_size; }

  std::vector<Row> rows;
  std::vector<int64_t> places;
  std::vector<float> partials;  // of a unit: what each query has Seen, results
  int64_t total = 0, tokens = 0, query_heads = 0, heads = 0, group = 0, queries = 0;
  int64_t value_dim = 0, padded_dim = 0, partial_size = 0;
};

// Attention of many tokens: q [B, T, H, key_dim] at `positions` [B, T], as for Attention, to
// y [B, T, H, value_dim].
struct Prompt {
  const void* q;
  void* y;
  Number type;
  const int64_t* positions;
  int64_t num_rows, num_tokens, num_heads;
  const Slots& slots;
  const Scoring& how;
};
void attend(const Prompt& prompt, int64_t num_threads, const packed::Parallel& parallel);
// Whether the processor is wide enough for it to be fast.
bool has_prompt_attention();

// ---- blocks ----

struct Norm {
  std::vector<float> weight, bias;  // no weight: no norm
  float eps = 0;
  bool is_layer = false, offset = false;
};

enum class Activation { silu, gelu, gelu_tanh, gelu_quick, relu };

struct Linear {
  std::vector<float> bias;
  std::unique_ptr<Product> product;
};

// See BlockParts in gptfast/fused.py.
struct Block {
  Norm attention_norm, q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm;
  Linear qkv, out, up, down;
  int64_t num_heads, num_kv_heads, head_dim, rotary_dim, rope;
  bool interleaved, is_gated, parallel, shared_norm;
  float multiplier;
  Activation activation;
  Scoring scoring;
  std::vector<float> sinks, slopes;
  Slots slots;
};

// cos and sin [count, rotary_dim / 2]: of each token, or of each position.
struct Turns {
  const float *cos, *sin;
  bool by_position;
};

class Step {
 public:
  // `memory`: of the ranks that each have a part of every block, or null. Their rows of `out` and
  // `down` are added up; all have to run the step with the same tokens.
  explicit Step(Number number, std::shared_ptr<shared::Memory> memory)
      : type(number), ranks(std::move(memory)) {}
  const Number type;
  const std::shared_ptr<shared::Memory> ranks;
  std::vector<Block> blocks;
  Norm norm;
  Linear head;

  // x [B * T, dim] in `type` -> logits [B * T, V], and of each the first of the largest.
  void run(const void* x, const int64_t* positions, int64_t num_rows, int64_t num_tokens,
           const std::vector<Turns>& turns, int num_threads, float* logits, int64_t* best);

 private:
  struct Worker;
  void prepare(const int64_t* positions, int64_t num_rows, int64_t num_tokens, int num_threads);
  Attention& attention_of(int64_t window);

  std::vector<int64_t> windows;
  std::vector<Attention> attention;  // of each window
  // A row for each token, in `type`.
  std::vector<char> x, qkv, queries, attended, hidden, y, scores;
  std::unique_ptr<Shares[]> phases;
  size_t num_phases = 0;
};

}  // namespace step
