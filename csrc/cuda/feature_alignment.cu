// Launches of feature alignment; the caller has set the device.

#include <cuda_runtime_api.h>

#include "feature_kernels.h"
#include "launch.h"

namespace fakd::cuda {

void align_features(
    const std::vector<FeatureLine>& lines, const FeatureParams& all, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  for (const FeatureParams& params : plan(lines, all)) {
    if (params.blocks > 0) {
      align_rows<<<params.blocks, THREADS, 0, on>>>(params);
      check_launch("align_rows");
    }
    sum_slots<<<params.count, THREADS, 0, on>>>(params);
    check_launch("sum_slots");
  }
}

bool has_device_code() {
  cudaFuncAttributes attributes;
  const bool is_found = cudaFuncGetAttributes(&attributes, align_rows) == cudaSuccess;
  cudaGetLastError();  // the answer is no error
  return is_found;
}

}  // namespace fakd::cuda
