// What linear.cpp, which knows PyTorch, has for others that do.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "kernels.h"

namespace packed {

// The weight of the buffers of quantize/kernels/cpu.py; `format` is a name of quantize/formats.py.
EXPORTED Weight packed_weight(const at::Tensor& values, const at::Tensor& scales,
                              const std::optional<at::Tensor>& zeros, const std::string& format,
                              int64_t num_rows, int64_t num_columns);

}  // namespace packed
