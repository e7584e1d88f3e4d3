// The ops of cpu_step.py and attention.py, which say what they mean.
#include "step.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "tensors.h"

namespace {

using at::Tensor;
using packed::Number;
using step::Step;
using Maybe = std::optional<Tensor>;

Number number(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kFloat, "numbers of type ", type,
                    " have no kernel; bfloat16 and float32 have");
  return type == at::kFloat ? Number::float32 : Number::bfloat16;
}

std::vector<float> floats(const Maybe& tensor) {
  if (!tensor) return {};
  const Tensor wide = tensor->to(at::kFloat).contiguous();
  const float* from = wide.const_data_ptr<float>();
  return {from, from + wide.numel()};
}

// One of each query head.
std::vector<float> floats_of(const Maybe& tensor, int64_t num_heads) {
  TORCH_CHECK_VALUE(!tensor || tensor->numel() == num_heads, "sinks and slopes are one of each of ",
                    num_heads, " query heads; ", tensor ? tensor->numel() : 0, " are given");
  return floats(tensor);
}

step::Slots slots_of(const Tensor& keys, const Tensor& values, const Maybe& key_scales,
                     const Maybe& value_scales, Number computed) {
  const auto type = keys.scalar_type();
  const auto stored = type == at::kChar             ? step::Stored::int8
                      : type == at::kFloat8_e4m3fn ? step::Stored::fp8
                                                   : step::Stored::as_computed;
  TORCH_CHECK_VALUE(keys.dim() == 4 && values.dim() == 4 && keys.stride(3) == 1 &&
                        values.stride(3) == 1 && keys.sizes().slice(0, 3) == values.sizes().slice(0, 3),
                    "keys and values must be [rows, heads, slots, numbers] alike");
  TORCH_CHECK_VALUE(values.scalar_type() == type &&
                        (stored != step::Stored::as_computed || number(keys) == computed),
                    "keys and values of type ", type, " are not those of the model");
  const auto scales = [&](const Maybe& of) {
    TORCH_CHECK_VALUE(of.has_value() == (stored != step::Stored::as_computed),
                      "numbers of eight bits, and only they, have scales");
    if (!of) return static_cast<float*>(nullptr);
    TORCH_CHECK_VALUE(of->is_contiguous() && of->scalar_type() == at::kFloat &&
                          of->numel() == keys.size(0) * keys.size(1) * keys.size(2),
                      "scales must be float32 [rows, heads, slots, 1]");
    return of->mutable_data_ptr<float>();
  };
  return {keys.data_ptr(),  values.data_ptr(), scales(key_scales), scales(value_scales),
          stored,           keys.size(0),      keys.size(1),      keys.size(2),       keys.size(3),
          values.size(3),   keys.stride(0),    keys.stride(1),     keys.stride(2),
          values.stride(0), values.stride(1),  values.stride(2)};
}

// Slots beyond the last would be memory of others.
void check_positions(const Tensor& positions, int64_t num_slots) {
  const int64_t* places = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i) {
    TORCH_CHECK_VALUE(0 <= places[i] && places[i] < num_slots, "position ", places[i],
                      " is none of 0 to ", num_slots - 1, ", the spare slot");
  }
}

// ---- attention ----

Tensor attention(const Tensor& q, const Tensor& keys, const Tensor& values,
                 const Tensor& positions, double scale, std::optional<int64_t> window,
                 std::optional<double> softcap, const Maybe& sinks, const Maybe& slopes,
                 const Maybe& key_scales, const Maybe& value_scales) {
  const Tensor queries = q.contiguous(), places = positions.to(at::kLong).contiguous();
  const Number type = number(q);
  const auto slots = slots_of(keys, values, key_scales, value_scales, type);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(0) <= slots.num_rows && q.size(3) == slots.key_dim &&
                        slots.num_heads && q.size(2) && q.size(2) % slots.num_heads == 0 &&
                        places.sizes() == q.sizes().slice(0, 2),
                    "queries do not fit the slots or the positions");
  check_positions(places, slots.num_slots);
  const auto own_sinks = floats_of(sinks, q.size(2)), own_slopes = floats_of(slopes, q.size(2));
  const step::Scoring how{static_cast<float>(scale), std::min(window.value_or(0), slots.num_slots),
                          static_cast<float>(softcap.value_or(0)),
                          sinks ? own_sinks.data() : nullptr, slopes ? own_slopes.data() : nullptr};
  const Tensor y = at::empty({q.size(0), q.size(1), q.size(2), values.size(3)}, q.options());
  if (q.size(1) > packed::MAX_ROWS) {
    step::attend({queries.const_data_ptr(), y.mutable_data_ptr(), type,
                  places.const_data_ptr<int64_t>(), q.size(0), q.size(1), q.size(2), slots, how},
                 at::get_num_threads(), [](int64_t parts, const packed::Body& body) {
                   at::parallel_for(0, parts, 1, body);
                 });
    return y;
  }
  const int64_t count = q.size(0) * q.size(1), width = q.size(2) * values.size(3);
  step::Attention work;
  work.plan(places.const_data_ptr<int64_t>(), q.size(0), q.size(1), q.size(2), slots, how.window);
  at::parallel_for(0, work.num_units(), 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) work.run(first, queries.const_data_ptr(), type, slots, how);
  });
  char* to = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t m = 0; m < count; ++m) {
    work.finish(m, type, slots, how, to + m * width * y.element_size());
  }
  return y;
}

// ---- steps, by number ----

std::mutex mutex;
std::unordered_map<int64_t, std::unique_ptr<Step>> steps;
int64_t next_number = 0;

Step& step_of(int64_t number) {
  const std::lock_guard lock(mutex);
  const auto found = steps.find(number);
  TORCH_CHECK_VALUE(found != steps.end(), "there is no step ", number);
  return *found->second;
}

int64_t new_step(bool is_float32, int64_t ranks) {
  const auto type = is_float32 ? Number::float32 : Number::bfloat16;
  const auto memory = ranks < 0 ? nullptr : shared::memory_of(ranks);
  const std::lock_guard lock(mutex);
  steps[next_number] = std::make_unique<Step>(type, memory);
  return next_number++;
}

void free_step(int64_t number) {
  const std::lock_guard lock(mutex);
  steps.erase(number);
}

void add_block(int64_t number, at::IntArrayRef sizes, at::ArrayRef<double> factors,
               std::string activation, const Maybe& sinks, const Maybe& slopes,
               const Tensor& keys, const Tensor& values, const Maybe& key_scales,
               const Maybe& value_scales) {
  static const std::string NAMES[] = {"silu", "gelu", "gelu_tanh", "gelu_quick", "relu"};
  const auto name = std::find(std::begin(NAMES), std::end(NAMES), activation);
  TORCH_CHECK_VALUE(name != std::end(NAMES), "activation ", activation, " has no kernel");
  TORCH_CHECK_VALUE(sizes.size() == 10 && factors.size() == 3 && sizes[3] <= 1024,
                    "a block has ten sizes and three factors, and rotates at most 1024 numbers");
  step::Block block;
  block.num_heads = sizes[0];
  block.num_kv_heads = sizes[1];
  block.head_dim = sizes[2];
  block.rotary_dim = sizes[3];
  block.rope = sizes[4];
  block.interleaved = sizes[5];
  block.is_gated = sizes[6];
  block.parallel = sizes[7];
  block.shared_norm = sizes[8];
  block.multiplier = factors[0];
  block.activation = static_cast<step::Activation>(name - std::begin(NAMES));
  block.sinks = floats_of(sinks, block.num_heads);
  block.slopes = floats_of(slopes, block.num_heads);
  const int64_t window = std::min(sizes[9], keys.size(2));
  block.scoring = {static_cast<float>(factors[1]), window, static_cast<float>(factors[2]),
                   sinks ? block.sinks.data() : nullptr, slopes ? block.slopes.data() : nullptr};
  block.slots = slots_of(keys, values, key_scales, value_scales, step_of(number).type);
  step_of(number).blocks.push_back(std::move(block));
}

void set_norm(int64_t number, std::string name, const Tensor& weight, const Maybe& bias,
              double eps, bool is_layer, bool offset) {
  Step& step = step_of(number);
  step::Norm norm{floats(weight), floats(bias), static_cast<float>(eps), is_layer, offset};
  if (name == "norm") {
    step.norm = std::move(norm);
    return;
  }
  TORCH_CHECK_VALUE(!step.blocks.empty(), "add a block first");
  step::Block& block = step.blocks.back();
  for (auto [own, place] :
       {std::pair("attention_norm", &block.attention_norm), std::pair("q_norm", &block.q_norm),
        std::pair("k_norm", &block.k_norm),
        std::pair("attention_post_norm", &block.attention_post_norm),
        std::pair("mlp_norm", &block.mlp_norm), std::pair("mlp_post_norm", &block.mlp_post_norm)}) {
    if (name == own) {
      *place = std::move(norm);
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "a block has no norm ", name);
}

// `kind` is a format of quantize/formats.py; "blocked", a weight of oneDNN's at `address`; or
// "plain".
void set_linear(int64_t number, std::string name, std::string kind, const Maybe& values,
                const Maybe& scales, const Maybe& zeros, const Maybe& bias, int64_t num_rows,
                int64_t num_columns, int64_t address, bool is_float32) {
  Step& step = step_of(number);
  step::Linear* place = &step.head;
  if (name != "head") {
    TORCH_CHECK_VALUE(!step.blocks.empty(), "add a block first");
    TORCH_CHECK_VALUE(name == "qkv" || name == "out" || name == "up" || name == "down",
                      "a block has no linear ", name);
    step::Block& block = step.blocks.back();
    place = name == "qkv"  ? &block.qkv
            : name == "out" ? &block.out
            : name == "up"  ? &block.up
                            : &block.down;
  }
  place->bias = floats(bias);
  const float* added = bias ? place->bias.data() : nullptr;
  const Number type = is_float32 ? Number::float32 : Number::bfloat16;
  if (kind == "blocked") {
    place->product = packed::blocked_product(reinterpret_cast<const void*>(address), num_rows,
                                             num_columns, added);
  } else if (kind == "plain") {
    TORCH_CHECK_VALUE(values && values->is_contiguous() && ::number(*values) == type,
                      "a plain weight must be contiguous and of the model's type");
    place->product =
        packed::plain_product(values->const_data_ptr(), num_rows, num_columns, type, added);
  } else {
    const auto weight = packed::packed_weight(*values, *scales, zeros, kind, num_rows, num_columns);
    place->product = packed::quantized_product(weight, type, added);
  }
  TORCH_CHECK_VALUE(place->product, "there is no kernel for a ", kind, " weight");
}

// Of so many places: positions or tokens.
std::vector<step::Turns> turns_of(const Step& step, at::TensorList cos, at::TensorList sin,
                                  bool by_position, int64_t count) {
  std::vector<step::Turns> turns;
  for (size_t i = 0; i < cos.size() && i < sin.size(); ++i) {
    for (const Tensor& each : {cos[i], sin[i]}) {
      TORCH_CHECK_VALUE(each.is_contiguous() && each.scalar_type() == at::kFloat,
                        "turns must be contiguous float32");
    }
    turns.push_back(
        {cos[i].const_data_ptr<float>(), sin[i].const_data_ptr<float>(), by_position});
  }
  for (const step::Block& block : step.blocks) {
    if (block.rotary_dim == 0) continue;
    const size_t rope = block.rope;
    TORCH_CHECK_VALUE(rope < turns.size(), "a block rotates by turns ", rope, " of ", turns.size());
    const int64_t needed = count * (block.rotary_dim / 2);
    TORCH_CHECK_VALUE(cos[rope].numel() >= needed && sin[rope].numel() >= needed, "turns of ", count,
                      " places by ", block.rotary_dim / 2, " are needed; ", cos[rope].sizes(),
                      " and ", sin[rope].sizes(), " are given");
  }
  return turns;
}

std::tuple<Tensor, Tensor> run_step(int64_t number, const Tensor& x, const Tensor& positions,
                                    at::TensorList cos, at::TensorList sin, bool by_position) {
  Step& step = step_of(number);
  const int64_t rows = x.size(0), tokens = x.size(1);
  TORCH_CHECK_VALUE(rows * tokens <= packed::MAX_ROWS && positions.sizes() == x.sizes().slice(0, 2),
                    "a step has at most ", packed::MAX_ROWS, " tokens with a position each");
  TORCH_CHECK_VALUE(step.blocks.size() && step.head.product, "a step needs blocks and a head");
  TORCH_CHECK_VALUE(rows <= step.blocks.front().slots.num_rows, rows, " rows do not fit a cache of ",
                    step.blocks.front().slots.num_rows);
  TORCH_CHECK_VALUE(::number(x) == step.type && x.size(2) == step.head.product->num_columns,
                    "x must be of the model's type and width");
  TORCH_CHECK_VALUE(!step.ranks || x.nbytes() <= step.ranks->piece_bytes, "ranks that share ",
                    step.ranks ? step.ranks->piece_bytes : 0, " bytes each cannot add up ",
                    x.nbytes(), "; create their memory with larger pieces");
  const auto options = x.options();
  const Tensor logits =
      at::empty({rows, tokens, step.head.product->num_rows}, options.dtype(at::kFloat));
  const Tensor best = at::empty({rows, tokens}, options.dtype(at::kLong));
  const Tensor from = x.contiguous(), places = positions.contiguous();
  const int64_t num_slots = step.blocks.front().slots.num_slots;
  check_positions(places, num_slots);
  const auto turns = turns_of(step, cos, sin, by_position, by_position ? num_slots : rows * tokens);
  step.run(from.const_data_ptr(), places.const_data_ptr<int64_t>(), rows, tokens, turns,
           at::get_num_threads(), logits.mutable_data_ptr<float>(),
           best.mutable_data_ptr<int64_t>());
  return {logits, best};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptfast, m) {
  m.def("new_step", new_step);
  m.def("free_step", free_step);
  m.def("add_block", add_block);
  m.def("set_norm", set_norm);
  m.def("set_linear", set_linear);
  m.def("run_step", run_step);
  m.def("has_blocked_product",
        [] { return packed::blocked_product(nullptr, 0, 0, nullptr) != nullptr; });
  m.def("slots_attention", attention);
  m.def("has_prompt_attention", step::has_prompt_attention);
}
