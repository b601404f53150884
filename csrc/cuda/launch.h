// After a launch: whether the card took it.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fakd::cuda {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(
      std::string("fakd_ext could not launch ") + kernel + ": " + cudaGetErrorString(error) +
      "; was the library built for this card? See TORCH_CUDA_ARCH_LIST.");
}

}  // namespace fakd::cuda
