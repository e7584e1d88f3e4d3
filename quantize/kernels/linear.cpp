// The ops of quantize/kernels/cpu.py, which says what they mean, for the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "kernels.h"
#include "tensors.h"

namespace {

using at::Tensor;
using packed::Number;
using packed::Weight;
using Maybe = std::optional<Tensor>;

Number number(at::ScalarType type) {
  if (type == at::kBFloat16) return Number::bfloat16;
  return type == at::kHalf ? Number::float16 : Number::float32;
}

}  // namespace

Weight packed::packed_weight(const Tensor& values, const Tensor& scales,
                             const std::optional<Tensor>& zeros, const std::string& format,
                             int64_t num_rows, int64_t num_columns) {
  Weight w{};
  w.mxfp4 = format.rfind("mxfp4", 0) == 0;
  w.nibbles = format.rfind("int8", 0) != 0;
  w.dynamic = format.find("-dynamic") != std::string::npos;
  w.values = values.const_data_ptr<uint8_t>();
  w.scales = static_cast<const char*>(scales.const_data_ptr());
  w.zeros = zeros ? static_cast<const char*>(zeros->const_data_ptr()) : nullptr;
  w.scale_type = number(scales.scalar_type());
  w.num_rows = num_rows;
  w.num_columns = num_columns;
  w.num_tiles = (num_rows + packed::TILE - 1) / packed::TILE;
  w.num_chunks = values.size(-3);
  w.num_groups = scales.size(-3);
  const int64_t per_chunk = w.nibbles ? 8 : 4;
  TORCH_CHECK_VALUE((num_columns + per_chunk - 1) / per_chunk == w.num_chunks, "x has ",
                    num_columns, " columns; the packed weight has ", w.num_chunks, " times ",
                    per_chunk);
  const int64_t stripes = values.size(-4), stripe_rows = packed::STRIPE * packed::TILE;
  TORCH_CHECK_VALUE((num_rows + stripe_rows - 1) / stripe_rows == stripes, num_rows,
                    " rows do not fit ", stripes, " packed stripes of ", stripe_rows);
  TORCH_CHECK_VALUE(!zeros || zeros->scalar_type() == scales.scalar_type(),
                    "zeros must have the dtype of the scales");
  const auto at = format.find("-g");
  w.group_size = w.mxfp4                     ? 32
                 : at == std::string::npos ? w.num_chunks * per_chunk
                                           : std::stoll(format.substr(at + 2));
  return w;
}

namespace {

void parallel(int64_t count, const packed::Body& body) { at::parallel_for(0, count, 1, body); }

// x [M, K] and y [M, N], contiguous.
void multiply(const Tensor& x, const Weight& w, const Maybe& bias, Tensor y) {
  TORCH_CHECK_VALUE(!bias || bias->numel() == w.num_rows, "a bias for ", w.num_rows,
                    " rows is needed");
  if (x.size(0) == 0 || w.num_rows == 0) return;
  Maybe wide;
  if (bias) wide = bias->to(at::kFloat).contiguous();
  const Number type = number(x.scalar_type());
  const float* added = wide ? wide->const_data_ptr<float>() : nullptr;
  if (x.size(0) >= packed::MIN_MANY_ROWS) {
    packed::multiply_many(w, type, x.const_data_ptr(), x.size(0), added, y.mutable_data_ptr(),
                          at::get_num_threads(), parallel);
    return;
  }
  const auto product = packed::quantized_product(w, type, added);
  packed::multiply(*product, type, x.const_data_ptr(), x.size(0), y.mutable_data_ptr(),
                   at::get_num_threads(), parallel);
}

bool is_direct(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat;
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& scales, const Maybe& zeros,
              const Maybe& bias, int64_t out_features, std::string format) {
  if (!is_direct(x)) {
    const Tensor wide = x.to(at::kFloat);
    return linear(wide, values, scales, zeros, bias, out_features, format).to(x.scalar_type());
  }
  const Weight w = packed::packed_weight(values, scales, zeros, format, out_features, x.size(-1));
  auto shape = x.sizes().vec();
  shape.back() = out_features;
  const Tensor y = at::empty(shape, x.options());
  multiply(x.reshape({-1, x.size(-1)}).contiguous(), w, bias, y.view({-1, out_features}));
  return y;
}

Tensor grouped_linear(const Tensor& x, const Tensor& values, const Tensor& scales,
                      const Maybe& zeros, const Maybe& bias, const Tensor& ends,
                      int64_t out_features, std::string format) {
  if (!is_direct(x)) {
    const Tensor wide = x.to(at::kFloat);
    return grouped_linear(wide, values, scales, zeros, bias, ends, out_features, format)
        .to(x.scalar_type());
  }
  TORCH_CHECK_VALUE(x.dim() == 2 && values.dim() == 5 && ends.dim() == 1 &&
                        ends.size(0) == values.size(0) && scales.size(0) == values.size(0) &&
                        (!zeros || zeros->size(0) == values.size(0)),
                    ends.numel(), " ends of groups of rows [P, K] do not fit the packed weights of ",
                    values.size(0), " groups");
  Weight w = packed::packed_weight(values, scales, zeros, format, out_features, x.size(-1));
  const int64_t tiles = values.size(-4) * packed::STRIPE;
  const int64_t value_bytes = tiles * w.num_chunks * packed::CHUNK_BYTES;
  const int64_t scale_bytes = tiles * w.num_groups * packed::TILE * w.scale_bytes();
  const Tensor rows = x.contiguous(), stops = ends.to(at::kLong).contiguous();
  const Tensor y = at::empty({x.size(0), out_features}, x.options());
  int64_t start = 0;
  for (int64_t group = 0; group < stops.numel(); ++group) {
    const int64_t stop = std::min(stops.const_data_ptr<int64_t>()[group], x.size(0));
    if (stop > start) {
      const Maybe of_group = bias ? Maybe(bias->select(0, group)) : std::nullopt;
      multiply(rows.narrow(0, start, stop - start), w, of_group, y.narrow(0, start, stop - start));
      start = stop;
    }
    w.values += value_bytes;
    w.scales += scale_bytes;
    if (w.zeros) w.zeros += scale_bytes;
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("packed_quantized_linear", linear);
  m.impl("packed_quantized_grouped_linear", grouped_linear);
}
