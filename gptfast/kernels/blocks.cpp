// The parts of a decode step, in the order in which `Block` of model.py has them. Every part is a
// loop over tokens or over units of a weight that threads share; between parts they wait. In a
// group of ranks each has some heads and hidden units of every block, and they wait for each other
// where these are added up.
//
// Numbers are rounded to the model's type where the tensors of model.py would hold them.
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "numbers.h"
#include "step.h"

namespace step {

// ---- threads ----

void Shares::begin(int64_t parts, int64_t size, int num_threads) {
  if (count != num_threads) {
    shares = std::make_unique<Share[]>(num_threads);
    count = num_threads;
  }
  grain = size;
  for (int i = 0; i < count; ++i) {
    shares[i].next.store(parts * i / count, std::memory_order_relaxed);
    shares[i].end = parts * (i + 1) / count;
  }
  pending.store(parts, std::memory_order_relaxed);
}

bool Shares::take(int thread, int64_t* first, int64_t* last) {
  for (int i = 0; i < count; ++i) {
    Share& share = shares[(thread + i) % count];
    if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
    *first = share.next.fetch_add(grain, std::memory_order_relaxed);
    *last = std::min(*first + grain, share.end);
    if (*first < share.end) return true;
  }
  return false;
}

void Shares::wait() const {
  constexpr int PATIENCE = 1 << 11;
  for (int spins = 0; pending.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < PATIENCE) _mm_pause();
    else sched_yield();
  }
}

// ---- rows ----

namespace {

constexpr int64_t TASK_BYTES = 64 << 10;   // of weights that a thread takes at a time
constexpr int64_t EARLY_BYTES = 64 << 10;  // that it fetches before it waits

// to [n] = the norm of x [n]; they may be the same.
void apply(const Norm& norm, Number type, const void* x, int64_t n, void* to) {
  Floats squares{}, sums{};
  by_lanes(n, [&](int64_t at, int64_t count) {
    const Floats v = load_some(type, x, at, count);
    squares += v * v;
    sums += v;
  });
  const float mean = norm.is_layer ? sum_of(sums) / n : 0;
  if (norm.is_layer) {
    squares = Floats{};
    by_lanes(n, [&](int64_t at, int64_t count) {
      Floats v = load_some(type, x, at, count) - mean;
      for (int64_t i = count; i < LANES; ++i) v[i] = 0;
      squares += v * v;
    });
  }
  const float scale = 1 / std::sqrt(sum_of(squares) / n + norm.eps);
  by_lanes(n, [&](int64_t at, int64_t count) {
    const Floats weight = load_some(Number::float32, norm.weight.data(), at, count);
    Floats v = (load_some(type, x, at, count) - mean) * scale;
    if (norm.is_layer) {
      v *= weight;
      if (!norm.bias.empty()) v += load_some(Number::float32, norm.bias.data(), at, count);
    } else {
      v = norm.offset ? v * (1 + weight) : rounded(type, v) * weight;
    }
    store_some(type, to, at, count, v);
  });
}

// x += multiplier * y
void add_to(Number type, void* x, const void* y, int64_t n, float multiplier) {
  by_lanes(n, [&](int64_t at, int64_t count) {
    const Floats v = load_some(type, x, at, count) + multiplier * load_some(type, y, at, count);
    store_some(type, x, at, count, v);
  });
}

Floats activated(Activation kind, Floats x) {
  switch (kind) {
    case Activation::silu: return x / (1 + exponential(-x));
    case Activation::gelu_quick: return x / (1 + exponential(-1.702f * x));
    case Activation::gelu_tanh:
      return 0.5f * x * (1 + hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x > 0 ? x : Floats{};
    case Activation::gelu: break;
  }
  // The error function by formula 7.1.26 of Abramowitz and Stegun, off by at most 1.5e-7.
  const Floats z = (x < 0 ? -x : x) * 0.70710678f;
  const Floats t = 1 / (1 + 0.3275911f * z);
  const Floats p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
                    0.254829592f) * t;
  const Floats tail = p * exponential(-z * z);  // 1 - erf(z)
  return 0.5f * x * (x < 0 ? tail : 2 - tail);
}

// y [n] = activation(up), or activation(gate) times up, where gate and up follow each other.
void activate(const Block& block, Number type, const void* up, int64_t n, void* y) {
  by_lanes(n, [&](int64_t at, int64_t count) {
    Floats v = activated(block.activation, load_some(type, up, at, count));
    if (block.is_gated) v = rounded(type, v) * load_some(type, up, n + at, count);
    store_some(type, y, at, count, v);
  });
}

// Floats of x [n], and the first place of the largest.
int64_t widen(Number type, const void* x, int64_t n, float* to) {
  Floats most = splat(-INFINITY);
  Ints is_nan{};
  by_lanes(n, [&](int64_t at, int64_t count) {
    Floats v = load_some(type, x, at, count);
    store_some(Number::float32, to, at, count, v);
    for (int64_t i = count; i < LANES; ++i) v[i] = -INFINITY;
    most = larger(v, most);
    is_nan |= v != v;
  });
  for (int i = 0; i < LANES; ++i) {
    if (is_nan[i]) return n - 1;  // as first_argmax: NaN equals nothing
  }
  return std::find(to, to + n, largest_of(most)) - to;
}

// Rotates the first numbers of a head: pairs (i, i + R/2), or neighbours that come out in that order.
void rotate(const Block& block, Number type, const float* cos, const float* sin, void* x) {
  const int64_t dim = block.rotary_dim, half = dim / 2;
  alignas(64) float from[2 * LANES], to[2][LANES];
  char turned[4 * 1024];
  for (int64_t at = 0; at < half; at += LANES) {
    const int64_t count = std::min(half - at, LANES);
    Floats first, second;
    if (block.interleaved) {
      for (int64_t i = 0; i < 2 * count; i += LANES) {
        const int64_t rest = std::min(2 * count - i, LANES);
        store(from + i, load_some(type, x, 2 * at + i, rest));
      }
      for (int64_t i = 0; i < count; ++i) {
        to[0][i] = from[2 * i];
        to[1][i] = from[2 * i + 1];
      }
      first = load<Floats>(to[0]);
      second = load<Floats>(to[1]);
    } else {
      first = load_some(type, x, at, count);
      second = load_some(type, x, half + at, count);
    }
    const Floats c = load_some(Number::float32, cos, at, count);
    const Floats s = load_some(Number::float32, sin, at, count);
    store_some(type, turned, at, count, first * c - second * s);
    store_some(type, turned, half + at, count, second * c + first * s);
  }
  std::memcpy(x, turned, dim * size_of(type));
}

// A vector to its slot, rounded to eight bits with a scale of its own where the cache has them: see
// rounding.py.
void keep(Stored stored, Number type, const void* x, int64_t dim, void* slot, float* scale) {
  if (stored == Stored::as_computed) {
    std::memcpy(slot, x, dim * size_of(type));
    return;
  }
  Floats most{};
  by_lanes(dim, [&](int64_t at, int64_t count) {
    const Floats v = load_some(type, x, at, count);
    const Floats size = v < 0 ? -v : v;
    most = most > size ? most : size;  // NaN stays
    for (int i = 0; i < LANES; ++i) most[i] = size[i] != size[i] ? size[i] : most[i];
  });
  float largest = 0;
  for (int i = 0; i < LANES; ++i) largest = largest >= most[i] ? largest : most[i];
  const float limit = stored == Stored::int8 ? 127 : 448;
  const float unit = largest / limit;
  *scale = unit < 1.17549435e-38f ? 1.17549435e-38f : unit;
  by_lanes(dim, [&](int64_t at, int64_t count) {
    const Floats v = load_some(type, x, at, count) / *scale;
    for (int64_t i = 0; i < count; ++i) {
      static_cast<uint8_t*>(slot)[at + i] =
          stored == Stored::int8 ? static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(v[i])))
                                 : float8_bits(v[i]);
    }
  });
}

}  // namespace

// ---- the step ----

// One thread's way through a step. All threads pass the same phases in the same order.
struct Step::Worker {
  Step& step;
  const int thread, num_threads;
  const int64_t* positions;
  const int64_t num_rows, num_tokens;
  const std::vector<Turns>& turns;
  size_t phase = 0;
  int64_t round = step.ranks ? step.ranks->round : 0;  // in which ranks have added up the latest

  int64_t count() const { return num_rows * num_tokens; }
  char* at(std::vector<char>& rows, int64_t m, int64_t width) const {
    return rows.data() + m * width * size_of(step.type);
  }

  // The next phase: body(first, last) for its parts. Who finds none left fetches the beginning of
  // its part of the weight that comes next.
  template <class Body>
  void share(const Body& body, const Linear* next = nullptr) {
    Shares& shares = step.phases[phase++];
    int64_t first, last;
    while (shares.take(thread, &first, &last)) {
      body(first, last);
      shares.finish(last - first);
    }
    if (next) fetch(*next->product);
    shares.wait();
  }

  // A phase of a part for each token.
  template <class Body>
  void each_token(const Linear* next, const Body& body) {
    share([&](int64_t m, int64_t) { body(m); }, next);
  }

  void multiply(const Linear& linear, void* y) {
    share([&](int64_t first, int64_t last) { linear.product->run(first, last, y); });
  }

  // To y, of which the ranks' sum is wanted. A rank says its part as soon as it is there, before any
  // of its threads waits for another's: so no order in which they come can stop them.
  void multiply_part(const Linear& linear) {
    if (!step.ranks) return multiply(linear, step.y.data());
    ++round;
    multiply(linear, step.ranks->place(step.ranks->rank, round));
    step.ranks->publish(round, shared::Kind::sum, count() * linear.product->num_rows * size_of(step.type));
  }

  // Row m of y.
  char* summed(int64_t m, int64_t dim) {
    char* y = at(step.y, m, dim);
    if (!step.ranks) return y;
    // After an abort nonsense is computed to the end, where `run` says so.
    if (step.ranks->wait_for_all(round, shared::Kind::sum, count() * dim * size_of(step.type))) {
      step.ranks->sum(round, step.type, m * dim, dim, y);
    }
    return y;
  }

  void fetch(const Product& product) const {
    const int64_t begin = product.num_units * thread / num_threads * product.unit_bytes;
    const int64_t end = product.num_units * (thread + 1) / num_threads * product.unit_bytes;
    const char* from = reinterpret_cast<const char*>(product.start) + begin;
    const int64_t size = std::min(end - begin, EARLY_BYTES);
    // (GCC takes a function that does nothing but _mm_prefetch for one that does nothing.)
    for (int64_t i = 0; i < size; i += 64) asm volatile("prefetcht1 %0" : : "m"(from[i]));
  }

  // Sets a row of a product: x, or its norm.
  void set_row(const Linear& linear, int64_t m, const Norm& norm, const void* x) {
    Product& product = *linear.product;
    if (norm.weight.empty()) return product.set_row(m, x);
    thread_local std::vector<char> normed;
    normed.resize(product.num_columns * size_of(step.type) + 64);
    apply(norm, step.type, x, product.num_columns, normed.data());
    product.set_row(m, normed.data());
  }

  // x += multiplier * norm(y), of one token.
  void add(const Norm& norm, float multiplier, int64_t m, int64_t dim) {
    char* y = summed(m, dim);
    if (!norm.weight.empty()) apply(norm, step.type, y, dim, y);
    add_to(step.type, at(step.x, m, dim), y, dim, multiplier);
  }

  void run(const Block& block) {
    const Number type = step.type;
    const int64_t dim = block.qkv.product->num_columns;
    const int64_t qkv_dim = block.qkv.product->num_rows;
    multiply(block.qkv, step.qkv.data());
    const int64_t heads = block.num_heads + 2 * block.num_kv_heads;
    share([&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        place(block, i / heads, i % heads, at(step.qkv, i / heads, qkv_dim));
      }
    });
    Attention& attention = step.attention_of(block.scoring.window);
    share([&](int64_t unit, int64_t) {
      attention.run(unit, step.queries.data(), type, block.slots, block.scoring);
    });
    each_token(&block.out, [&](int64_t m) {
      char* row = at(step.attended, m, block.out.product->num_columns);
      attention.finish(m, type, block.slots, block.scoring, row);
      block.out.product->set_row(m, row);
    });
    multiply_part(block.out);
    each_token(&block.up, [&](int64_t m) {
      char* x = at(step.x, m, dim);
      const Norm& norm = block.shared_norm ? block.attention_norm : block.mlp_norm;
      if (block.parallel) set_row(block.up, m, norm, x);
      add(block.attention_post_norm, block.multiplier, m, dim);
      if (!block.parallel) set_row(block.up, m, norm, x);
    });
    multiply(block.up, step.hidden.data());
    each_token(&block.down, [&](int64_t m) {
      char* row = at(step.hidden, m, block.up.product->num_rows);
      activate(block, type, row, block.down.product->num_columns, row);
      block.down.product->set_row(m, row);
    });
    multiply_part(block.down);
  }

  // Head `h` of a token's queries, keys and values: normed, rotated, and to where it belongs.
  void place(const Block& block, int64_t m, int64_t h, char* qkv) {
    const Number type = step.type;
    const int64_t dim = block.head_dim, size = size_of(type);
    char* x = qkv + h * dim * size;
    const bool is_query = h < block.num_heads, is_value = h >= block.num_heads + block.num_kv_heads;
    const Norm& norm = is_query ? block.q_norm : block.k_norm;
    if (!is_value) {
      if (!norm.weight.empty()) apply(norm, type, x, dim, x);
      if (block.rotary_dim) {
        const Turns& turn = turns[block.rope];
        const int64_t at = (turn.by_position ? positions[m] : m) * (block.rotary_dim / 2);
        rotate(block, type, turn.cos + at, turn.sin + at, x);
      }
    }
    if (is_query) {
      std::memcpy(at(step.queries, m, block.num_heads * dim) + h * dim * size, x, dim * size);
      return;
    }
    const Slots& slots = block.slots;
    const int64_t row = m / num_tokens, head = (h - block.num_heads) % block.num_kv_heads;
    const int64_t slot = positions[m], each = slots.stored == Stored::as_computed ? size : 1;
    const int64_t scale = (row * slots.num_heads + head) * slots.num_slots + slot;
    if (is_value) {
      const int64_t place = row * slots.value_row + head * slots.value_head + slot * slots.value_slot;
      keep(slots.stored, type, x, dim, static_cast<char*>(slots.values) + place * each,
           slots.value_scales + scale);
    } else {
      const int64_t place = row * slots.key_row + head * slots.key_head + slot * slots.key_slot;
      keep(slots.stored, type, x, dim, static_cast<char*>(slots.keys) + place * each,
           slots.key_scales + scale);
    }
  }

  void run(float* logits, int64_t* best) {
    const int64_t dim = step.head.product->num_columns;
    const Block* before = nullptr;
    for (const Block& block : step.blocks) {
      each_token(&block.qkv, [&](int64_t m) {
        if (before) add(before->mlp_post_norm, before->multiplier, m, dim);
        set_row(block.qkv, m, block.attention_norm, at(step.x, m, dim));
      });
      run(block);
      before = &block;
    }
    each_token(&step.head, [&](int64_t m) {
      add(before->mlp_post_norm, before->multiplier, m, dim);
      set_row(step.head, m, step.norm, at(step.x, m, dim));
    });
    multiply(step.head, step.scores.data());
    const int64_t width = step.head.product->num_rows;
    each_token(nullptr, [&](int64_t m) {
      best[m] = widen(step.type, at(step.scores, m, width), width, logits + m * width);
    });
  }
};

void Step::run(const void* from, const int64_t* positions, int64_t num_rows, int64_t num_tokens,
               const std::vector<Turns>& turns, int num_threads, float* logits, int64_t* best) {
  prepare(positions, num_rows, num_tokens, num_threads);
  if (ranks && !ranks->wait_for_place(ranks->round + 1)) ranks->check();
  std::memcpy(x.data(), from,
              num_rows * num_tokens * head.product->num_columns * size_of(type));
  const auto work = [&](int thread) {
    Worker{*this, thread, num_threads, positions, num_rows, num_tokens, turns}.run(logits, best);
  };
  // However many threads come: the others' shares are taken by them.
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
  work(omp_get_thread_num());
#else
  work(0);
#endif
  if (ranks) {
    ranks->round += 2 * blocks.size();
    ranks->check();
  }
}

Attention& Step::attention_of(int64_t window) {
  return attention[std::find(windows.begin(), windows.end(), window) - windows.begin()];
}

void Step::prepare(const int64_t* positions, int64_t num_rows, int64_t num_tokens,
                   int num_threads) {
  const int64_t count = num_rows * num_tokens;
  const auto grow = [&](std::vector<char>& rows, int64_t width) {
    const size_t size = count * width * size_of(type) + 64;
    if (rows.size() < size) rows.resize(size);
  };
  for (const Block& block : blocks) {
    if (std::find(windows.begin(), windows.end(), block.scoring.window) == windows.end()) {
      windows.push_back(block.scoring.window);
    }
    grow(qkv, block.qkv.product->num_rows);
    grow(queries, block.num_heads * block.head_dim);
    grow(attended, block.out.product->num_columns);
    grow(hidden, block.up.product->num_rows);
  }
  grow(x, head.product->num_columns);
  grow(y, head.product->num_columns);
  grow(scores, head.product->num_rows);
  attention.resize(windows.size());
  const Block& block = blocks.front();
  for (size_t i = 0; i < windows.size(); ++i) {
    attention[i].plan(positions, num_rows, num_tokens, block.num_heads, block.slots, windows[i]);
  }

  constexpr size_t PER_BLOCK = 10, BEHIND = 3;
  if (num_phases != PER_BLOCK * blocks.size() + BEHIND) {
    num_phases = PER_BLOCK * blocks.size() + BEHIND;
    phases = std::make_unique<Shares[]>(num_phases);
  }
  size_t phase = 0;
  const auto share = [&](int64_t parts, int64_t grain) {
    phases[phase++].begin(parts, grain, num_threads);
  };
  const auto rows_and_units = [&](const Linear& linear) {
    Product& product = *linear.product;
    product.begin(count);
    share(count, 1);
    share(product.num_units, std::max<int64_t>(TASK_BYTES / product.unit_bytes, 1));
  };
  for (const Block& each : blocks) {
    rows_and_units(each.qkv);
    share(count * (each.num_heads + 2 * each.num_kv_heads), 8);
    share(attention_of(each.scoring.window).num_units(), 1);
    rows_and_units(each.out);
    rows_and_units(each.up);
    rows_and_units(each.down);
  }
  rows_and_units(head);
  share(count, 1);
}

}  // namespace step
