// Tensors of the stable ABI as what the engines take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/rows.h"

namespace fakd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fakd_ext takes float32, float16 and bfloat16 tensors only.");
  return Dtype::float32;
}

// A matrix with a contiguous last axis; a vector counts as one row.
inline Rows rows_of(const Tensor& tensor) {
  const bool is_vector = tensor.dim() == 1;
  STD_TORCH_CHECK(tensor.is_cpu(), "fakd_ext takes CPU tensors only.");
  STD_TORCH_CHECK(is_vector || tensor.dim() == 2, "fakd_ext takes vectors and matrices only.");
  Rows rows;
  rows.data = const_cast<void*>(tensor.const_data_ptr());
  rows.dtype = dtype_of(tensor);
  rows.rows = is_vector ? 1 : tensor.size(0);
  rows.columns = tensor.size(is_vector ? 0 : 1);
  rows.stride = is_vector ? rows.columns : tensor.stride(0);
  STD_TORCH_CHECK(
      rows.columns <= 1 || tensor.stride(is_vector ? 0 : 1) == 1,
      "fakd_ext takes tensors with a contiguous last axis only.");
  return rows;
}

inline Rows pick(const std::vector<Tensor>& tensors, int64_t index) {
  return index < 0 ? Rows{} : rows_of(tensors.at(size_t(index)));
}

}  // namespace fakd
