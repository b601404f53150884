// Launches on the rows of pairs with a projection; the caller has set the device.

#include <cuda_runtime_api.h>

#include "launch.h"
#include "projected_kernels.h"

namespace fakd::cuda {

void align_projected(
    const std::vector<ProjectedLine>& lines, const ProjectedParams& all, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  for (const ProjectedParams& params : plan(lines, all)) {
    const bool is_bfloat16 = params.lines[0].grad_dtype == Dtype::bfloat16;
    const auto kernel =
        is_bfloat16 ? align_projected_rows<__nv_bfloat16> : align_projected_rows<float>;
    kernel<<<params.blocks, THREADS, 0, on>>>(params);
    check_launch("align_projected_rows");
  }
}

void sum_values(const std::vector<ValueLine>& lines, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  for (const ValueLaunch& launch : plan(lines)) {
    sum_row_values<<<launch.count, THREADS, 0, on>>>(launch.params);
    check_launch("sum_row_values");
  }
}

}  // namespace fakd::cuda
