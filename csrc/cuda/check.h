// What the launchers of both bindings check, in words.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "launch_shape.h"

namespace fakd::cuda {

using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fakd_ext takes float32, float16 and bfloat16 tensors only.");
  return Dtype::float32;
}

inline std::string shape_of(const Tensor& tensor) {
  std::string words = "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    words += (axis > 0 ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return words + "]";
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), name,
      " must be on the CUDA device of the student, ", int(first.get_device_index()), ": got ",
      tensor.is_cuda() ? std::to_string(tensor.get_device_index()) : std::string("no CUDA tensor"),
      "; move it there.");
}

inline void check_shape(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
      " must have the shape [", rows, ", ", columns, "]: got ", shape_of(tensor), ".");
}

// A contiguous float32 tensor of so many elements.
inline float* floats_of(
    const char* name, const Tensor& tensor, int64_t count, const Tensor& first) {
  check_device(name, tensor, first);
  STD_TORCH_CHECK(
      tensor.numel() == count && tensor.is_contiguous() && dtype_of(tensor) == Dtype::float32, name,
      " must be contiguous float32 with ", count, " elements: got ", shape_of(tensor), ".");
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Kernels run on the current stream of a device, a cudaStream_t.
inline void* current_stream(const Tensor& first) {
  void* stream = nullptr;
  // Not by torch's own macro: its name differs between 2.11 and 2.13.
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream) == 0,
      "CUDA device ", first.get_device_index(), " must have a current stream: torch gave none.");
  return stream;
}

}  // namespace fakd::cuda
